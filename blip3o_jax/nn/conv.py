"""Convolutions on NHWC with explicit symmetric padding, as in torch.

B batch, Y X pixels, C channels. Kernels are stored HWIO; depthwise ones [y x C].
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.nn.kernels import convolve, depthwise
from blip3o_jax.nn.parameters import TORCH_INIT, Initializer, add_bias, parameter

AXES = (None, None, "conv_in", "conv_out")  # logical axes of a dense kernel


class Conv(nn.Module):
    """Dense convolution with padding (kernel_size - 1) // 2 on every side."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    kernel_init: Initializer = TORCH_INIT

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B Y X C] -> [B Y/stride X/stride features]."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = parameter(self, "kernel", self.kernel_init, shape, AXES)
        pad = (self.kernel_size - 1) // 2
        y = convolve(x.astype(self.dtype), kernel.astype(self.dtype), ((pad, pad), (pad, pad)), self.stride)
        return add_bias(self, y, "conv_out")


class UpsampleConv(nn.Module):
    """Nearest-neighbour upsampling by 2 followed by a 3x3 convolution, without forming the upsampled image.

    Only four of the nine pixels under the kernel differ, so each of the four output phases is a 2x2 convolution of the
    small image with sums of kernel taps: 16 products instead of 36.
    """

    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    kernel_init: Initializer = TORCH_INIT

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B Y X C] -> [B 2Y 2X features]."""
        batch, height, width, channels = x.shape
        kernel = parameter(self, "kernel", self.kernel_init, (3, 3, channels, self.features), AXES)
        kernel, x = kernel.astype(jnp.float32), x.astype(self.dtype)
        # kernel taps that fall on the same pixel of the small image, for even and odd output positions
        taps = ((slice(0, 1), slice(1, 3)), (slice(0, 2), slice(2, 3)))
        pads = ((1, 0), (0, 1))
        rows = []
        for a in range(2):
            tall = jnp.stack([kernel[tap].sum(axis=0) for tap in taps[a]])
            phases = []
            for b in range(2):
                small = jnp.stack([tall[:, tap].sum(axis=1) for tap in taps[b]], axis=1)
                phases.append(convolve(x, small.astype(self.dtype), (pads[a], pads[b])))
            rows.append(jnp.stack(phases, axis=3))
        y = jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, self.features)
        return add_bias(self, y, "conv_out")


class DepthwiseConv(nn.Module):
    """Convolution with one filter per channel, stride 1, same output size."""

    kernel_size: int = 3
    use_bias: bool = True
    axis: str = "conv_out"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=(0, 1), out_axis=())

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B Y X C] -> [B Y X C]."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1])
        kernel = parameter(self, "kernel", self.kernel_init, shape, (None, None, self.axis))
        return add_bias(self, depthwise(x.astype(self.dtype), kernel.astype(self.dtype)), self.axis)
