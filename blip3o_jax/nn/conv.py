"""Convolutions on NHWC with explicit symmetric padding, as torch has it.

B batch, Y X pixels, C channels. Kernels are stored HWIO; depthwise ones [y x C].
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.nn.linear import Initializer
from blip3o_jax.nn.spread import spread

TORCH_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
Padding = tuple[tuple[int, int], tuple[int, int]]
STRIP_POSITIONS = 4096  # output positions that one strip of a convolution covers: its sums stay in the CPU's cache


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


def convolve(x: jax.Array, kernel: jax.Array, padding: Padding, stride: int = 1) -> jax.Array:
    """Dense convolution of `x[B Y X C]` with `kernel[y x C F]`, both of one dtype, which is the result's.

    In bfloat16 on CPU, where XLA convolves in float32, wide layers run as matrix products over strips of rows
    (1.5 times faster without bfloat16 tiles in the processor, and a third of the memory).
    """
    whole = functools.partial(_convolve_whole, padding=padding, stride=stride)
    if x.dtype != jnp.bfloat16 or stride != 1 or x.shape[-1] < 64:
        return whole(x, kernel)
    strips = functools.partial(_convolve_strips, padding)
    return jax.lax.platform_dependent(x, kernel, cpu=strips, default=whole)


def _convolve_whole(x: jax.Array, kernel: jax.Array, padding: Padding, stride: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve_strips(padding: Padding, pixels: jax.Array, kernel: jax.Array) -> jax.Array:
    """Strips of rows, each a sum over the kernel's rows of one product [positions, x*C] @ [x*C, F].

    Pixels are moved as integers: XLA on CPU would carry them in float32.
    """
    size_y, size_x, channels, features = kernel.shape
    pixels = jax.lax.bitcast_convert_type(pixels, jnp.uint16)
    x = jnp.pad(pixels, ((0, 0), *padding, (0, 0)))
    batch, height, width = x.shape[0], x.shape[1] - size_y + 1, x.shape[2] - size_x + 1
    rows = max(n for n in range(1, height + 1) if height % n == 0 and (n == 1 or n * width * batch <= STRIP_POSITIONS))
    kernel = kernel.reshape(size_y, size_x * channels, features)

    def strip(start):
        part = jax.lax.dynamic_slice_in_dim(x, start, rows + size_y - 1, axis=1)
        part = jnp.concatenate([part[:, :, j : j + width] for j in range(size_x)], axis=-1)
        part = jax.lax.bitcast_convert_type(part, kernel.dtype)
        products = (
            jnp.einsum("BYXC,CF->BYXF", part[:, i : i + rows], kernel[i], preferred_element_type=jnp.float32)
            for i in range(size_y)
        )
        return jax.lax.bitcast_convert_type(functools.reduce(jnp.add, products).astype(kernel.dtype), jnp.uint16)

    # a buffer of zeros would be filled before the first layer runs, for every layer; this one waits for its input
    out = jnp.broadcast_to(pixels[0, 0, 0, 0], (batch, height, width, features))

    def step(i, out):
        return jax.lax.dynamic_update_slice_in_dim(out, strip(i * rows), i * rows, axis=1)

    out = strip(0) if rows == height else jax.lax.fori_loop(0, height // rows, step, out)
    return jax.lax.bitcast_convert_type(out, kernel.dtype)


def _strips_forward(padding, x, kernel):
    return _convolve_strips(padding, x, kernel), (x, kernel)


def _strips_backward(padding, residuals, gradient):
    return jax.vjp(functools.partial(_convolve_whole, padding=padding), *residuals)[1](gradient)


_convolve_strips.defvjp(_strips_forward, _strips_backward)


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


def depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Depthwise convolution of `x[B Y X C]` with `kernel[y x C]`, zero padding, same size.

    On CPU as shifted multiply-adds, which XLA vectorises over channels (20-30 times faster there than its
    grouped convolution); elsewhere as a grouped convolution.
    """
    size = kernel.shape[0]
    pad = (size - 1) // 2
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_shifted, pad),
        default=lambda x, kernel: jax.lax.conv_general_dilated(
            x,
            kernel[:, :, None, :],
            (1, 1),
            ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        ),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _shifted(pad: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    kernel = kernel.astype(jnp.promote_types(x.dtype, jnp.float32))
    taps = [window * kernel[i, j] for (i, j), window in _windows(pad, x, kernel.shape)]
    return sum(taps[1:], taps[0]).astype(x.dtype)


def _shifted_forward(pad, x, kernel):
    return _shifted(pad, x, kernel), (x, kernel)


def _shifted_backward(pad, residuals, gradient):
    """Left to itself, the input's gradient would be a sum of nine padded arrays, several times as slow."""
    x, kernel = residuals
    gradient = gradient.astype(jnp.promote_types(x.dtype, jnp.float32))
    taps = [(window * gradient).sum(axis=(0, 1, 2)) for _, window in _windows(pad, x, kernel.shape)]
    to_x = _shifted(pad, gradient.astype(x.dtype), kernel[::-1, ::-1])
    return to_x, jnp.stack(taps).reshape(kernel.shape).astype(kernel.dtype)


_shifted.defvjp(_shifted_forward, _shifted_backward)


def _windows(pad: int, x: jax.Array, kernel_shape: tuple[int, ...]) -> list[tuple[tuple[int, int], jax.Array]]:
    """Row and column of every tap of a kernel, and the pixels that it meets, in float32 or wider.

    Pixels in bfloat16 are moved as integers: half the memory, a quarter of the compilation, up to 4 times faster.
    """
    height, width = x.shape[1:3]
    narrow = x.dtype == jnp.bfloat16
    padded = jax.lax.bitcast_convert_type(x, jnp.uint16) if narrow else x
    padded = jnp.pad(padded, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    def window(i, j):
        pixels = padded[:, i : i + height, j : j + width]
        if narrow:  # a bfloat16 is the upper half of a float32
            return jax.lax.bitcast_convert_type(pixels.astype(jnp.uint32) << 16, jnp.float32)
        return pixels.astype(jnp.promote_types(x.dtype, jnp.float32))

    rows, columns = kernel_shape[:2]
    return [((i, j), window(i, j)) for i in range(rows) for j in range(columns)]
