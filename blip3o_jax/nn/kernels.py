"""Primitive operations of the layers, in the form that is fastest on each platform.

Every function has a plain form, which accelerators run. Where XLA compiles it badly for CPU there is a second form, and
`by_platform` selects one by the platform that the program is compiled for.

B batch, Y X pixels, C channels, D width, F features, L layers.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Padding = tuple[tuple[int, int], tuple[int, int]]
POSITION_TILE = 64  # positions moved together when an operand is transposed
STRIP_POSITIONS = 4096  # output positions of one convolution strip, so that its sums stay in the CPU cache

forced_branch = jax.make_user_context(None)
"""`with forced_branch("default"):` makes programs traced within use that branch on every platform."""
PLAIN = "plain"
"""`with forced_branch(PLAIN):` disables custom gradients and library kernels, so that `jax.jvp` works."""


def by_platform(*operands: Any, **branches: Callable) -> Any:
    """Applies the branch of the platform that the program is compiled for (cpu, cuda, tpu), or `default`."""
    forced = forced_branch.value
    if forced == PLAIN:
        branches = {platform: branches[platform] for platform in ("cpu", "default") if platform in branches}
    elif forced is not None:
        return branches.get(forced, branches["default"])(*operands)
    return jax.lax.platform_dependent(*operands, **branches)


def own_gradient(function: Callable, static: tuple[int, ...] = ()) -> Callable:
    """Applies `jax.custom_vjp`, except within `forced_branch(PLAIN)`: a custom VJP has no forward derivative.

    Args:
      function: to be differentiated by rules set with `defvjp`.
      static: positions of non-array arguments.
    """
    own = jax.custom_vjp(function, nondiff_argnums=static)

    @functools.wraps(function)
    def chosen(*operands):
        return (function if forced_branch.value == PLAIN else own)(*operands)

    chosen.defvjp = own.defvjp
    return chosen


def one_device() -> bool:
    """Whether programs run on a single device: custom kernels cannot be partitioned."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    """Returns float32, or `dtype` if that is wider."""
    return jnp.promote_types(dtype, jnp.float32)


# On CPU, XLA converts slices of bfloat16 arrays to float32 and hoists the conversion out of loops, so that a scan over
# stacked layers would hold a float32 copy of all of them. Slices of integers are not converted.


def _to_bits(tree: Any) -> Any:
    """Bitcasts bfloat16 leaves to uint16. Not differentiable."""
    if forced_branch.value == PLAIN:
        return tree
    return jax.tree.map(lambda x: jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x, tree)


def _from_bits(tree: Any) -> Any:
    """Inverts `_to_bits`."""
    return jax.tree.map(lambda x: jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x, tree)


@own_gradient
def take_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Gathers rows [... D] of table[V D] by ids i32[...]."""

    def as_integers(table, ids):
        table, ids = jax.lax.optimization_barrier((table, ids))  # keeps XLA from copying the table ahead of a loop
        return _from_bits(_plain_rows(_to_bits(table), ids))

    return by_platform(table, ids, cpu=as_integers, default=_plain_rows)


def _plain_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take(table, ids, axis=0)


take_rows.defvjp(
    lambda table, ids: jax.vjp(lambda table: _plain_rows(table, ids), table),
    lambda vjp, gradient: (*vjp(gradient), None),
)


def unstack(tree: Any) -> tuple[Any, ...]:
    """Splits a tree of stacks along the leading axis L into L trees; a list of L arrays is a stack that is split."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_split)
    parts = (leaf if is_split(leaf) else _unstack(leaf) for leaf in leaves)
    return tuple(structure.unflatten(elements) for elements in zip(*parts))


def is_split(leaf: Any) -> bool:
    """Whether a leaf of a tree of stacks is a list of L arrays."""
    return isinstance(leaf, list)


@own_gradient
def _unstack(leaf: jax.Array) -> tuple[jax.Array, ...]:
    """Splits one leaf. The default gradient would add up L stacks, each zero except for one element."""

    def plain(leaf):
        return tuple(leaf[i] for i in range(leaf.shape[0]))

    return by_platform(leaf, cpu=lambda leaf: _from_bits(plain(_to_bits(leaf))), default=plain)


_unstack.defvjp(lambda leaf: (_unstack(leaf), None), lambda _, gradients: (jnp.stack(gradients),))


def scan_layers(layer: Callable, stacked: Any, carry: Any, shared: Any) -> tuple[Any, Any]:
    """Scans `layer(carry, *element, shared) -> (carry, output)` over the elements of a tuple of stacks."""
    forms = functools.partial(_scan_on_cpu, layer), functools.partial(_scan, layer)
    return by_platform(stacked, carry, shared, cpu=forms[0], default=forms[1])


def _scan(layer: Callable, stacked: Any, carry: Any, shared: Any) -> tuple[Any, Any]:
    return jax.lax.scan(lambda carry, own: layer(carry, *own, shared), carry, stacked)


@functools.partial(own_gradient, static=(0,))
def _scan_on_cpu(layer: Callable, stacked: Any, carry: Any, shared: Any) -> tuple[Any, Any]:
    def step(carry, i):
        held, i = jax.lax.optimization_barrier((stacked, i))  # keeps the conversion to float32 inside the loop
        own = _from_bits(jax.tree.map(lambda leaf: _element(leaf, i), _to_bits(held)))
        carry, output = layer(carry, *own, shared)
        return carry, _to_bits(output)

    carry, outputs = jax.lax.scan(step, carry, jnp.arange(len(jax.tree.leaves(stacked)[0])))
    return carry, _from_bits(outputs)


def _element(stack: jax.Array, i: jax.Array) -> jax.Array:
    """Returns element i; of float32 vectors by a product, since XLA does not vectorise their slices in fusions."""
    if stack.ndim != 2 or stack.dtype != jnp.float32:
        return stack[i]
    chosen = (jnp.arange(len(stack)) == i).astype(stack.dtype)
    return jnp.matmul(chosen, stack, precision=jax.lax.Precision.HIGHEST)


_scan_on_cpu.defvjp(  # the backward pass stores the states of all layers anyway
    lambda layer, *operands: jax.vjp(functools.partial(_scan, layer), *operands),
    lambda layer, vjp, cotangents: vjp(cotangents),
)


def matmul(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype, transposed: bool = False) -> jax.Array:
    """Computes `x[... D] @ kernel[D F]` in `dtype`; accumulates and returns float32 or wider.

    In bfloat16 both products of the gradient also have bfloat16 operands and float32 accumulation. The gradient of a
    float32 kernel is not rounded.

    Args:
      x: [... D].
      kernel: [D F].
      dtype: type of the operands.
      transposed: the kernel is stored as [F D].
    """
    dtype = jnp.dtype(dtype)
    if dtype != jnp.bfloat16:
        return _wide_product(transposed, x.astype(dtype), kernel.astype(dtype))
    return _bfloat16_product(transposed, x.astype(dtype), kernel)


def _product(x: jax.Array, kernel: jax.Array, transposed: bool) -> jax.Array:
    dimensions = (((x.ndim - 1,), (int(transposed),)), ((), ()))
    return jax.lax.dot_general(x, kernel, dimensions, preferred_element_type=_wide(x.dtype))


@functools.partial(own_gradient, static=(0,))
def _wide_product(transposed: bool, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns f32[... F]. The default kernel gradient would transpose the gradient of y even if x is narrower; on CPU
    that is a slow copy that recomputes its input."""
    return _product(x, kernel, transposed)


def _wide_backward(transposed, residuals, gradient):
    x, kernel = residuals
    gradient = by_platform(gradient, cpu=jax.lax.optimization_barrier, default=lambda x: x)
    to_x = _product(gradient, kernel, not transposed).astype(x.dtype)
    return to_x, _sum_over_rows(*((gradient, x) if transposed else (x, gradient))).astype(kernel.dtype)


_wide_product.defvjp(lambda transposed, x, kernel: (_product(x, kernel, transposed), (x, kernel)), _wide_backward)


def _sum_over_rows(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns [D F], `x[... D]` and `y[... F]` multiplied and summed over all rows. XLA on CPU copies the first operand
    to transpose it, so the narrower one comes first."""
    if x.shape[-1] > y.shape[-1]:
        return _sum_over_rows(y, x).T
    leading = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, y, ((leading, leading), ((), ())))


@functools.partial(own_gradient, static=(0,))
def _bfloat16_product(transposed: bool, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns f32[... F]. The default gradient would be two slow products of float32 with bfloat16."""
    product = functools.partial(_product, transposed=transposed)

    def two_rows(x, kernel):
        return product(jnp.concatenate([x, x]), kernel)[:1]

    kernel = kernel.astype(x.dtype)
    if x.size == x.shape[-1] and x.ndim > 1:
        # XLA's bfloat16 matrix-vector product on CPU is about nine times slower than one with two rows
        return by_platform(x, kernel, cpu=two_rows, default=product)
    return product(x, kernel)


def _bfloat16_backward(transposed, residuals, gradient):
    x, kernel = residuals
    gradient = gradient.astype(x.dtype)
    to_x = _product(gradient, kernel.astype(x.dtype), not transposed).astype(x.dtype)
    rows, columns = (y.reshape(-1, y.shape[-1]) for y in ((gradient, x) if transposed else (x, gradient)))
    return to_x, _over_positions(rows, columns).astype(kernel.dtype)


_bfloat16_product.defvjp(
    lambda transposed, x, kernel: (_bfloat16_product(transposed, x, kernel), (x, kernel)), _bfloat16_backward
)


def _over_positions(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns f32[D F], `x[M D]` and `y[M F]` in bfloat16 multiplied and summed over M."""

    def product(x, y):
        return jax.lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    def laid_out(x, y):
        x = x.reshape(-1, POSITION_TILE, x.shape[1]).transpose(2, 0, 1)
        return _product(jax.lax.optimization_barrier(x).reshape(x.shape[0], -1), y, transposed=False)

    if x.shape[0] % POSITION_TILE or not one_device():
        return product(x, y)
    return by_platform(x, y, cpu=laid_out, default=product)


def spread(vector: jax.Array, like: jax.Array) -> jax.Array:
    """Broadcasts a bias or scale `vector[F]` to the shape `[... F]` and the dtype of `like`.

    The gradient is summed in float32 or wider and rounded once, to the vector's dtype.
    """
    return _spread(like.shape, like.dtype, vector)


@functools.partial(own_gradient, static=(0, 1))
def _spread(shape: tuple[int, ...], dtype: jnp.dtype, vector: jax.Array) -> jax.Array:
    return jnp.broadcast_to(vector.astype(dtype), shape)


def _spread_backward(shape, dtype, vector, gradient):
    def product_with_ones(rows):
        # on CPU a reduction over leading axes is several times slower, and so is a bfloat16 product with a single row
        ones = jnp.ones((2, rows.shape[0]), rows.dtype)
        return jnp.dot(ones, rows, preferred_element_type=_wide(rows.dtype))[0]

    def total(rows):
        return rows.sum(axis=0, dtype=_wide(rows.dtype))

    total = by_platform(gradient.reshape(-1, shape[-1]), cpu=product_with_ones, default=total)
    return (total.astype(vector.dtype),)


_spread.defvjp(lambda shape, dtype, vector: (_spread(shape, dtype, vector), vector), _spread_backward)


def convolve(x: jax.Array, kernel: jax.Array, padding: Padding, stride: int = 1) -> jax.Array:
    """Convolves `x[B Y X C]` densely with `kernel[y x C F]`; both and the result have the same dtype.

    XLA on CPU would convolve bfloat16 in float32. Wide layers run there as matrix products over strips of rows, with a
    third of the memory and, on processors without bfloat16 matrix units, 1.5 times as fast.
    """
    whole = functools.partial(_convolution, padding=padding, stride=stride)
    if x.dtype != jnp.bfloat16 or stride != 1 or x.shape[-1] < 64:
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
    pixels = _to_bits(pixels)
    x = jnp.pad(pixels, ((0, 0), *padding, (0, 0)))
    batch, height, width = x.shape[0], x.shape[1] - size_y + 1, x.shape[2] - size_x + 1
    rows = max(n for n in range(1, height + 1) if height % n == 0 and (n == 1 or n * width * batch <= STRIP_POSITIONS))
    kernel = kernel.reshape(size_y, size_x * channels, features)

    def strip(start):
        part = jax.lax.dynamic_slice_in_dim(x, start, rows + size_y - 1, axis=1)
        part = _from_bits(jnp.concatenate([part[:, :, j : j + width] for j in range(size_x)], axis=-1))
        products = (
            jnp.einsum("BYXC,CF->BYXF", part[:, i : i + rows], kernel[i], preferred_element_type=jnp.float32)
            for i in range(size_y)
        )
        return _to_bits(functools.reduce(jnp.add, products).astype(kernel.dtype))

    # XLA would fill zero buffers for all layers before the first one runs; this buffer depends on the input
    out = jnp.broadcast_to(pixels[0, 0, 0, 0], (batch, height, width, features))

    def step(i, out):
        return jax.lax.dynamic_update_slice_in_dim(out, strip(i * rows), i * rows, axis=1)

    out = strip(0) if rows == height else jax.lax.fori_loop(0, height // rows, step, out)
    return _from_bits(out)


_convolve_strips.defvjp(
    lambda padding, *operands: (_convolve_strips(padding, *operands), operands),
    lambda padding, operands, gradient: jax.vjp(functools.partial(_convolution, padding=padding), *operands)[1](
        gradient
    ),
)


def depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves `x[B Y X C]` channel by channel with `kernel[y x C]`, zero padding, same size.

    On CPU it runs as shifted multiply-adds, which XLA vectorises over channels: 20 to 30 times as fast. On a GPU XLA
    fuses them with what follows. The gradient of the kernel is a sum over shifted pixels on every platform.
    """
    pad = (kernel.shape[0] - 1) // 2
    shifted, grouped = functools.partial(_shifted, pad), functools.partial(_grouped, pad)
    return by_platform(x, kernel, cpu=shifted, cuda=shifted, default=grouped)


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
    kernel = kernel.astype(_wide(x.dtype))
    taps = [window * kernel[i, j] for (i, j), window in _windows(pad, x, kernel.shape)]
    return sum(taps[1:], taps[0]).astype(x.dtype)


def _shifted_backward(pad, residuals, gradient):
    """Computes the gradient; the default one for x would add up nine padded arrays, several times as slow."""
    x, kernel = residuals
    return _shifted(pad, gradient, kernel[::-1, ::-1]), _over_windows(pad, x, kernel, gradient)


_shifted.defvjp(lambda pad, x, kernel: (_shifted(pad, x, kernel), (x, kernel)), _shifted_backward)


def _over_windows(pad: int, x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> jax.Array:
    """Returns the gradient of `kernel[y x C]`, summed in float32 or wider over `x` and `gradient`, both `[B Y X C]`."""
    gradient = gradient.astype(_wide(x.dtype))
    taps = [(window * gradient).sum(axis=(0, 1, 2)) for _, window in _windows(pad, x, kernel.shape)]
    return jnp.stack(taps).reshape(kernel.shape).astype(kernel.dtype)


def _windows(pad: int, x: jax.Array, kernel_shape: tuple[int, ...]) -> list[tuple[tuple[int, int], jax.Array]]:
    """Returns (row, column) of every kernel tap with the pixels it multiplies, in float32 or wider.

    bfloat16 pixels are moved as integers: half the memory, a quarter of the compile time, up to 4 times as fast.
    """
    height, width = x.shape[1:3]
    padded = jnp.pad(_to_bits(x), ((0, 0), (pad, pad), (pad, pad), (0, 0)))

    def window(i, j):
        pixels = padded[:, i : i + height, j : j + width]
        if pixels.dtype == jnp.uint16:  # the upper half of a float32
            return jax.lax.bitcast_convert_type(pixels.astype(jnp.uint32) << 16, jnp.float32)
        return pixels.astype(_wide(x.dtype))

    rows, columns = kernel_shape[:2]
    return [((i, j), window(i, j)) for i in range(rows) for j in range(columns)]
