"""Primitive operations of the layers, in the form that is fastest on each platform.

Every function has a plain form, which accelerators run. Where XLA compiles it badly for CPU there is a second form, and
`by_platform` selects one by the platform that the program is compiled for.

D width, F features, L layers.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from blip3o_jax.sharding import batch_devices

POSITION_TILE = 64  # positions moved together when an operand is transposed
BLOCK = 128  # rows of a block-diagonal matrix

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


def rows_per_device(rows: int) -> int:
    """Returns the number of rows per device of a batch of `rows`, under the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return rows if mesh.empty else -(-rows // batch_devices(mesh))


# On CPU, XLA converts slices of bfloat16 arrays to float32 and hoists the conversion out of loops, so that a scan over
# stacked layers would hold a float32 copy of all of them. Slices of integers are not converted.


def to_bits(tree: Any) -> Any:
    """Bitcasts bfloat16 leaves to uint16. Not differentiable."""
    if forced_branch.value == PLAIN:
        return tree
    return jax.tree.map(lambda x: jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x, tree)


def from_bits(tree: Any) -> Any:
    """Inverts `to_bits`."""
    return jax.tree.map(lambda x: jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x, tree)


@own_gradient
def take_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Gathers rows [... D] of table[V D] by ids i32[...]."""

    def as_integers(table, ids):
        table, ids = jax.lax.optimization_barrier((table, ids))  # keeps XLA from copying the table ahead of a loop
        return from_bits(_plain_rows(to_bits(table), ids))

    return by_platform(table, ids, cpu=as_integers, default=_plain_rows)


def _plain_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take(table, ids, axis=0)


take_rows.defvjp(
    lambda table, ids: jax.vjp(lambda table: _plain_rows(table, ids), table),
    lambda vjp, gradient: (*vjp(gradient), None),
)


def largest(x: jax.Array) -> jax.Array:
    """Returns the index i32[...] of the largest element of f32[... V], the first of equal ones.

    XLA on CPU fuses `argmax` with what computes its operand, and then vectorises neither: Gumbel noise took it four
    times as long.
    """

    def top(x):
        x = jnp.where(x == 0, 0, x)  # top_k ranks -0.0 below 0.0
        return jax.lax.top_k(x, 1)[1][..., 0]  # a call that reads its operand from memory

    def plain(x):
        return jnp.argmax(x, axis=-1).astype(jnp.int32)

    return by_platform(jax.lax.stop_gradient(x), cpu=top, default=plain)


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

    return by_platform(leaf, cpu=lambda leaf: from_bits(plain(to_bits(leaf))), default=plain)


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
        own = from_bits(jax.tree.map(lambda leaf: _element(leaf, i), to_bits(held)))
        return layer(carry, *own, shared)

    return jax.lax.scan(step, carry, jnp.arange(len(jax.tree.leaves(stacked)[0])))


def _element(stack: jax.Array, i: jax.Array) -> jax.Array:
    """Returns element i; of vectors and depthwise kernels by a product: XLA vectorises no fusion with their slices."""
    if stack.ndim not in (2, 4) or not (stack.dtype == jnp.uint16 or jnp.issubdtype(stack.dtype, jnp.floating)):
        return stack[i]
    elements = from_bits(stack).reshape(len(stack), -1)
    chosen = jnp.broadcast_to(jnp.arange(len(stack)) == i, (2, len(stack)))  # two rows: faster in bfloat16
    element = jnp.matmul(chosen.astype(elements.dtype), elements, precision=jax.lax.Precision.HIGHEST)[0]
    return to_bits(element.reshape(stack.shape[1:]))


_scan_on_cpu.defvjp(  # the backward pass stores the states of all layers anyway
    lambda layer, *operands: jax.vjp(functools.partial(_scan, layer), *operands),
    lambda layer, vjp, cotangents: vjp(cotangents),
)


def matmul(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype, transposed: bool = False) -> jax.Array:
    """Computes `x[... D] @ kernel[D F]` in `dtype`; accumulates and returns float32.

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
    return jax.lax.dot_general(x, kernel, dimensions, preferred_element_type=jnp.float32)


@functools.partial(own_gradient, static=(0,))
def _wide_product(transposed: bool, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns f32[... F]. The default kernel gradient would transpose the gradient of y even if x is narrower; on CPU
    that is a slow copy that recomputes its input."""
    return _product(x, kernel, transposed)


def _wide_backward(transposed, residuals, gradient):
    x, kernel = residuals
    gradient = by_platform(gradient, cpu=jax.lax.optimization_barrier, default=lambda x: x)
    to_x = _product(gradient, kernel, not transposed)
    return to_x, _sum_over_rows(*((gradient, x) if transposed else (x, gradient)))


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


def grouped_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies every group of D consecutive channels of `x[... G*D]` by its own matrix of `kernel[G D D]`.

    Sums are float32; the result has the dtype and the shape of `x`. For a batch axis in the middle, XLA on CPU
    would transpose `x`, within the loop that computes it, and then not vectorise that loop. On one such device, a few
    groups at a time are multiplied by a block-diagonal matrix; on several, whose groups may be partitioned, that would
    move them between devices.
    """
    groups, width, _ = kernel.shape

    def plain(x, kernel):
        y = jnp.einsum("...GI,GIO->...GO", x.reshape(*x.shape[:-1], groups, width), kernel.astype(jnp.float32))
        return y.astype(x.dtype).reshape(x.shape)

    def in_blocks(x, kernel):
        together = max(1, BLOCK // width)
        firsts = range(0, groups, together)
        matrices = (jax.scipy.linalg.block_diag(*kernel[first : first + together]) for first in firsts)
        parts = jnp.split(x, [first * width for first in firsts[1:]], axis=-1)
        products = (matmul(part, matrix, x.dtype) for part, matrix in zip(parts, matrices))
        return jnp.concatenate([y.astype(x.dtype) for y in products], axis=-1)

    return by_platform(x, kernel, cpu=in_blocks if one_device() else plain, default=plain)


def spread(vector: jax.Array, like: jax.Array) -> jax.Array:
    """Broadcasts a bias or scale `vector[F]` to the shape `[... F]` and the dtype of `like`.

    The gradient is summed in float32 and rounded once, to the vector's dtype.
    """
    return _spread(like.shape, like.dtype, vector)


@functools.partial(own_gradient, static=(0, 1))
def _spread(shape: tuple[int, ...], dtype: jnp.dtype, vector: jax.Array) -> jax.Array:
    return jnp.broadcast_to(vector.astype(dtype), shape)


def _spread_backward(shape, dtype, vector, gradient):
    def product_with_ones(rows):
        # on CPU a reduction over leading axes is several times slower, and so is a bfloat16 product with a single row
        ones = jnp.ones((2, rows.shape[0]), rows.dtype)
        return jnp.dot(ones, rows, preferred_element_type=jnp.float32)[0]

    def total(rows):
        return rows.sum(axis=0, dtype=jnp.float32)

    total = by_platform(gradient.reshape(-1, shape[-1]), cpu=product_with_ones, default=total)
    return (total.astype(vector.dtype),)


_spread.defvjp(lambda shape, dtype, vector: (_spread(shape, dtype, vector), vector), _spread_backward)
