"""Linear layer and embedding table with logical axes.

B any leading dimensions, D input width, F output width, V rows.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.nn.bits import from_bits, to_bits
from blip3o_jax.nn.spread import spread

Initializer = Callable[..., jax.Array]
POSITION_TILE = 64  # positions moved together where XLA on CPU needs an operand laid out to multiply it in bfloat16


def matmul(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype, transposed: bool = False) -> jax.Array:
    """`x[... D] @ kernel[D F]` in `dtype`, accumulated and returned in float32 or wider.

    In bfloat16 the two products of the gradient are of bfloat16 operands too, accumulated in float32; the kernel's is
    not rounded on its way to a float32 kernel.

    Args:
      transposed: the kernel is stored [F D].
    """
    dtype = jnp.dtype(dtype)
    if dtype != jnp.bfloat16:
        return _wide_product(transposed, x.astype(dtype), kernel.astype(dtype))
    return _bfloat16_product(transposed, x.astype(dtype), kernel)


def _product(x: jax.Array, kernel: jax.Array, transposed: bool) -> jax.Array:
    dimensions = (((x.ndim - 1,), (int(transposed),)), ((), ()))
    return jax.lax.dot_general(x, kernel, dimensions, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _wide_product(transposed: bool, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """f32[... F]. Left to itself, the kernel's gradient would transpose the gradient of y though x may be narrower:
    a copy on CPU, which computes it once more, one element after the other."""
    return _product(x, kernel, transposed)


def _wide_backward(transposed, residuals, gradient):
    x, kernel = residuals
    gradient = jax.lax.platform_dependent(gradient, cpu=jax.lax.optimization_barrier, default=lambda x: x)
    to_x = _product(gradient, kernel, not transposed).astype(x.dtype)
    return to_x, _sum_over_rows(*((gradient, x) if transposed else (x, gradient))).astype(kernel.dtype)


_wide_product.defvjp(lambda transposed, x, kernel: (_product(x, kernel, transposed), (x, kernel)), _wide_backward)


def _sum_over_rows(x: jax.Array, y: jax.Array) -> jax.Array:
    """[D F]: `x[... D]` and `y[... F]`, multiplied and summed over all rows. XLA on CPU transposes the first operand of
    such a product by a copy: the narrower of the two."""
    if x.shape[-1] > y.shape[-1]:
        return _sum_over_rows(y, x).T
    leading = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, y, ((leading, leading), ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bfloat16_product(transposed: bool, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """f32[... F]. Left to itself, the gradient would be two products of float32 with bfloat16: slow everywhere."""
    product = functools.partial(_product, transposed=transposed)

    def two_rows(x, kernel):
        return product(jnp.concatenate([x, x]), kernel)[:1]

    kernel = kernel.astype(x.dtype)
    if x.size == x.shape[-1] and x.ndim > 1:
        # XLA's bfloat16 matrix-vector product on CPU is about nine times slower than one with two rows
        return jax.lax.platform_dependent(x, kernel, cpu=two_rows, default=product)
    return product(x, kernel)


def _bfloat16_forward(transposed, x, kernel):
    return _bfloat16_product(transposed, x, kernel), (x, kernel)


def _bfloat16_backward(transposed, residuals, gradient):
    x, kernel = residuals
    gradient = gradient.astype(x.dtype)
    to_x = _product(gradient, kernel.astype(x.dtype), not transposed).astype(x.dtype)
    rows, columns = (y.reshape(-1, y.shape[-1]) for y in ((gradient, x) if transposed else (x, gradient)))
    return to_x, _over_positions(rows, columns).astype(kernel.dtype)


_bfloat16_product.defvjp(_bfloat16_forward, _bfloat16_backward)


def _over_positions(x: jax.Array, y: jax.Array) -> jax.Array:
    """f32[D F]: `x[M D]` and `y[M F]` in bfloat16, summed over their M positions."""

    def product(x, y):
        return jax.lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    def laid_out(x, y):
        x = x.reshape(-1, POSITION_TILE, x.shape[1]).transpose(2, 0, 1)
        return _product(jax.lax.optimization_barrier(x).reshape(x.shape[0], -1), y, transposed=False)

    mesh = jax.sharding.get_abstract_mesh()
    if x.shape[0] % POSITION_TILE or not (mesh.empty or mesh.size == 1):
        return product(x, y)
    return jax.lax.platform_dependent(x, y, cpu=laid_out, default=product)


class Linear(nn.Module):
    """`x @ kernel + bias`; kernel is stored [D F].

    Attributes:
      features: F.
      axes: logical names of the kernel's two dimensions.
    """

    features: int
    axes: tuple[str | None, str | None]
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's default

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(self.kernel_init, self.axes),
            (x.shape[-1], self.features),
            self.param_dtype,
        )
        y = matmul(x, kernel, self.dtype).astype(self.dtype)
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[1:])
            y = y + spread(self.param("bias", init, (self.features,), self.param_dtype), y)
        return y


@jax.custom_vjp
def take_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows [... D] of table[V D], moved as integers: XLA on CPU would widen a bfloat16 table to look into it."""
    table, ids = jax.lax.optimization_barrier((table, ids))  # not to be copied ahead of a loop
    return from_bits(jnp.take(to_bits(table), ids, axis=0))


take_rows.defvjp(
    lambda table, ids: jax.vjp(lambda table: jnp.take(table, ids, axis=0), table),
    lambda vjp, gradient: (*vjp(gradient), None),
)


class Embedding(nn.Module):
    """Table [V D] looked up by id; its rows serve as an output projection too."""

    num_rows: int
    features: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    stddev: float = 0.02

    def setup(self):
        self.table = self.param(
            "table",
            nn.with_logical_partitioning(nn.initializers.normal(self.stddev), ("vocab", "embed")),
            (self.num_rows, self.features),
            self.param_dtype,
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        """i32[...] -> dtype[... D]."""
        return take_rows(self.table, ids).astype(self.dtype)

    def rows(self, start: int = 0, size: int | None = None) -> jax.Array:
        """dtype[size D]: rows start, start + 1, ... of the table, all of them by default."""
        rows = self.table if size is None else jax.lax.slice_in_dim(self.table, start, start + size)
        return rows.astype(self.dtype)


def row_logits(x: jax.Array, rows: jax.Array) -> jax.Array:
    """f32[... V] scores of [... D] against the rows [V D] of an output projection."""
    return matmul(x, rows, rows.dtype, transposed=True)


def chunk_size(most: int, length: int) -> int:
    """Positions whose scores are held at a time: as few chunks as do, of one size, so that little is filled up."""
    count = -(-length // most)
    return -(-length // count)
