"""Convolutions on NHWC with explicit symmetric padding, as in torch.

B batch, Y X pixels, C channels, F features. Kernels are stored HWIO; depthwise ones [y x C].
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.nn.kernels import by_platform, from_bits, own_gradient, rows_per_device, to_bits
from blip3o_jax.nn.parameters import add_bias, parameter, torch_init

Padding = tuple[tuple[int, int], tuple[int, int]]
WIDE = 64  # channels of a layer whose products are wide enough for the CPU
SUBLANES = 8  # of a TPU's vector registers
STRIP_SIZE = 2**18  # elements of a strip of a convolution, with 1 MB of sums, so that it stays in the CPU cache
AXES = (None, None, "conv_in", "conv_out")  # logical axes of a dense kernel


class Conv(nn.Module):
    """Dense convolution with padding (kernel_size - 1) // 2 on every side."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B Y X C] -> [B Y/stride X/stride features]."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = parameter(self, "kernel", torch_init(), shape, AXES)
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

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B Y X C] -> [B 2Y 2X features]."""
        batch, height, width, channels = x.shape
        kernel = parameter(self, "kernel", torch_init(), (3, 3, channels, self.features), AXES)
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

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B Y X C] -> [B Y X C]."""
        init = torch_init(in_axis=(0, 1), out_axis=(), batch_axis=(2,))
        shape = (self.kernel_size, self.kernel_size, x.shape[-1])
        kernel = parameter(self, "kernel", init, shape, (None, None, self.axis))
        return add_bias(self, depthwise(x.astype(self.dtype), kernel.astype(self.dtype)), self.axis)


def convolve(x: jax.Array, kernel: jax.Array, padding: Padding, stride: int = 1) -> jax.Array:
    """Convolves `x[B Y X C]` densely with `kernel[y x C F]`; both and the result have the same dtype.

    XLA on CPU would convolve bfloat16 in float32. There it runs as matrix products over strips of rows, which takes
    less memory and time.
    """
    whole = functools.partial(_convolution, padding=padding, stride=stride)
    if x.dtype != jnp.bfloat16 or stride != 1:
        return whole(x, kernel)
    return by_platform(x, kernel, cpu=functools.partial(_convolve_strips, padding), default=whole)


def _convolution(x: jax.Array, kernel: jax.Array, padding: Padding, stride: int = 1, groups: int = 1) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


@functools.partial(own_gradient, static=(0,))
def _convolve_strips(padding: Padding, pixels: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves strip by strip; a strip is a sum over kernel rows of products [positions, x*C] @ [x*C, F]."""
    size_y, size_x, channels, features = kernel.shape
    pixels = to_bits(pixels)
    x = jnp.pad(pixels, ((0, 0), *padding, (0, 0)))
    batch, height, width = x.shape[0], x.shape[1] - size_y + 1, x.shape[2] - size_x + 1
    shape = batch, height, width, features
    if channels < WIDE and width % 2 == 0:
        x, kernel = _in_pairs(x, kernel)
        size_y, size_x, channels, features = kernel.shape
        width = x.shape[2] - size_x + 1
    most = max(1, STRIP_SIZE // (batch * width * max(channels, features)))
    rows = max(n for n in range(1, min(most, height) + 1) if height % n == 0)
    kernel = kernel.reshape(size_y, size_x * channels, features)

    def strip(start):
        part = jax.lax.dynamic_slice_in_dim(x, start, rows + size_y - 1, axis=1)
        part = from_bits(jnp.concatenate([part[:, :, j : j + width] for j in range(size_x)], axis=-1))
        products = (
            jnp.einsum("BYXC,CF->BYXF", part[:, i : i + rows], kernel[i], preferred_element_type=jnp.float32)
            for i in range(size_y)
        )
        return to_bits(functools.reduce(jnp.add, products).astype(kernel.dtype))

    # XLA would fill zero buffers for all layers before the first one runs; this buffer depends on the input
    out = jnp.broadcast_to(pixels[0, 0, 0, 0], (batch, height, width, features))

    def step(i, out):
        return jax.lax.dynamic_update_slice_in_dim(out, strip(i * rows), i * rows, axis=1)

    out = strip(0) if rows == height else jax.lax.fori_loop(0, height // rows, step, out)
    return from_bits(out).reshape(shape)


def _in_pairs(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Writes a convolution without padding as one of pairs of pixels, each with 2C channels and 2F features.

    Products of narrow layers become wide enough for the processor, although some of their factors are zero.
    """
    size_y, size_x, channels, features = kernel.shape
    spare = (size_x + 1) % 2
    x = jnp.pad(x, ((0, 0), (0, 0), (0, spare), (0, 0)))
    shifted = [jnp.pad(kernel, ((0, 0), (i, 1 - i + spare), (0, 0), (0, 0))) for i in range(2)]
    kernel = jnp.stack(shifted, axis=3).reshape(size_y, -1, 2 * channels, 2 * features)
    return x.reshape(*x.shape[:2], -1, 2 * channels), kernel


_convolve_strips.defvjp(
    lambda padding, *operands: (_convolve_strips(padding, *operands), operands),
    lambda padding, operands, gradient: jax.vjp(functools.partial(_convolution, padding=padding), *operands)[1](
        gradient
    ),
)


def depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves `x[B Y X C]` channel by channel with `kernel[y x C]`, zero padding, same size.

    On CPU it runs as shifted multiply-adds, which XLA vectorises over channels: 20 to 30 times as fast. On a GPU XLA
    fuses them with what follows. On a TPU they replace a convolution of fewer rows per device than sublanes, for which
    XLA would pad, cut and copy the pixels (`benchmarks/depthwise.py`). The gradient of the kernel is a sum over
    shifted pixels on every platform.
    """
    pad = (kernel.shape[0] - 1) // 2
    shifted, grouped = functools.partial(_shifted, pad), functools.partial(_grouped, pad)
    tpu = shifted if rows_per_device(x.shape[0]) < SUBLANES else grouped
    return by_platform(x, kernel, cpu=shifted, cuda=shifted, tpu=tpu, default=grouped)


@functools.partial(own_gradient, static=(0,))
def _grouped(pad: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    return _convolution(x, kernel[:, :, None, :], ((pad, pad), (pad, pad)), groups=x.shape[-1])


def _grouped_backward(pad, residuals, gradient):
    """Computes the gradient without XLA's own for the kernel, which is wrong on some meshes.

    XLA adds it up over all devices, also over those that hold copies of the same rows (jax 0.8.3 to 0.12.0).
    """
    x, kernel = residuals
    return _grouped(pad, gradient, kernel[::-1, ::-1]), _over_windows(pad, x, kernel, gradient)


_grouped.defvjp(lambda pad, x, kernel: (_grouped(pad, x, kernel), (x, kernel)), _grouped_backward)


@functools.partial(own_gradient, static=(0,))
def _shifted(pad: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    kernel = kernel.astype(jnp.float32)
    taps = [window * kernel[i, j] for (i, j), window in _windows(pad, x, kernel.shape)]
    return sum(taps[1:], taps[0]).astype(x.dtype)


def _shifted_backward(pad, residuals, gradient):
    """Computes the gradient; the default one for x would add up nine padded arrays, several times as slow."""
    x, kernel = residuals
    return _shifted(pad, gradient, kernel[::-1, ::-1]), _over_windows(pad, x, kernel, gradient)


_shifted.defvjp(lambda pad, x, kernel: (_shifted(pad, x, kernel), (x, kernel)), _shifted_backward)


def _over_windows(pad: int, x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> jax.Array:
    """Returns the gradient of `kernel[y x C]`, summed in float32 over `x` and `gradient`, both `[B Y X C]`."""
    gradient = gradient.astype(jnp.float32)
    taps = [(window * gradient).sum(axis=(0, 1, 2)) for _, window in _windows(pad, x, kernel.shape)]
    return jnp.stack(taps).reshape(kernel.shape).astype(kernel.dtype)


def _windows(pad: int, x: jax.Array, kernel_shape: tuple[int, ...]) -> list[tuple[tuple[int, int], jax.Array]]:
    """Returns (row, column) of every kernel tap with the pixels it multiplies, in float32.

    bfloat16 pixels are moved as integers: half the memory, a quarter of the compile time, up to 4 times as fast.
    """
    height, width = x.shape[1:3]
    padded = jnp.pad(to_bits(x), ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    def window(i, j):
        pixels = padded[:, i : i + height, j : j + width]
        if pixels.dtype == jnp.uint16:  # the upper half of a float32
            return jax.lax.bitcast_convert_type(pixels.astype(jnp.uint32) << 16, jnp.float32)
        return pixels.astype(jnp.float32)

    rows, columns = kernel_shape[:2]
    return [((i, j), window(i, j)) for i in range(rows) for j in range(columns)]
