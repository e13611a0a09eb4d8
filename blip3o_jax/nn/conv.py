"""Convolutions on NHWC with explicit symmetric padding, as torch has it.

B batch, Y X pixels, C channels. Kernels are stored HWIO; depthwise ones [y x C].
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.nn.kernels import convolve, depthwise, spread
from blip3o_jax.nn.linear import Initializer

TORCH_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


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
        kernel, bias = conv_params(self, x.shape[-1])
        pad = (self.kernel_size - 1) // 2
        y = convolve(x.astype(self.dtype), kernel.astype(self.dtype), ((pad, pad), (pad, pad)), self.stride)
        return y if bias is None else y + spread(bias, y)


class UpsampleConv(nn.Module):
    """Nearest-neighbour upsampling by 2 followed by a 3x3 convolution, without the larger picture in between.

    Of the nine pixels under the kernel only four differ, so each of the four output phases is a 2x2 convolution of
    the small picture with sums of the kernel's taps: 16 products in place of 36.
    """

    features: int
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    kernel_size: int = 3
    kernel_init: Initializer = TORCH_INIT

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B Y X C] -> [B 2Y 2X features]."""
        kernel, bias = conv_params(self, x.shape[-1])
        kernel = kernel.astype(jnp.float32)
        # taps of the large picture that fall on one pixel of the small one, for even and odd output positions
        taps = ((slice(0, 1), slice(1, 3)), (slice(0, 2), slice(2, 3)))
        pads = ((1, 0), (0, 1))
        rows = []
        for a in range(2):
            tall = jnp.stack([kernel[tap].sum(axis=0) for tap in taps[a]])
            phases = []
            for b in range(2):
                small = jnp.stack([tall[:, tap].sum(axis=1) for tap in taps[b]], axis=1)
                phases.append(convolve(x.astype(self.dtype), small.astype(self.dtype), (pads[a], pads[b])))
            rows.append(jnp.stack(phases, axis=3))
        batch, height, width, _ = x.shape
        y = jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, self.features)
        return y if bias is None else y + spread(bias, y)


def conv_params(module: "Conv | UpsampleConv", channels: int) -> tuple[jax.Array, jax.Array | None]:
    """Declares kernel and bias of a dense convolution over `channels` in the calling module."""
    axes = (None, None, "conv_in", "conv_out")
    init = nn.with_logical_partitioning(module.kernel_init, axes)
    shape = (module.kernel_size, module.kernel_size, channels, module.features)
    kernel = module.param("kernel", init, shape, module.param_dtype)
    if not module.use_bias:
        return kernel, None
    init = nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[3:])
    return kernel, module.param("bias", init, (module.features,), module.param_dtype)


class DepthwiseConv(nn.Module):
    """One filter per channel, stride 1, same size out."""

    kernel_size: int = 3
    use_bias: bool = True
    axis: str = "conv_out"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=(0, 1), out_axis=())

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B Y X C] -> [B Y X C]."""
        channels = x.shape[-1]
        init = nn.with_logical_partitioning(self.kernel_init, (None, None, self.axis))
        kernel = self.param("kernel", init, (self.kernel_size, self.kernel_size, channels), self.param_dtype)
        y = depthwise(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), (self.axis,))
            y = y + spread(self.param("bias", init, (channels,), self.param_dtype), y)
        return y
