"""A vector of channels at every position: biases and scales.

M positions, F channels.
"""

import functools

import jax
import jax.numpy as jnp


def spread(vector: jax.Array, like: jax.Array) -> jax.Array:
    """`vector[F]` in the shape `[... F]` and the dtype of `like`.

    The gradient is summed in float32 or wider and rounded once, to the vector's dtype.
    """
    return _spread(like.shape, like.dtype, vector)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _spread(shape: tuple[int, ...], dtype: jnp.dtype, vector: jax.Array) -> jax.Array:
    return jnp.broadcast_to(vector.astype(dtype), shape)


def _forward(shape, dtype, vector):
    return _spread(shape, dtype, vector), vector


def _backward(shape, dtype, vector, gradient):
    total = jax.lax.platform_dependent(gradient.reshape(-1, shape[-1]), cpu=_product_with_ones, default=_sum)
    return (total.astype(vector.dtype),)


_spread.defvjp(_forward, _backward)


def _sum(rows: jax.Array) -> jax.Array:
    return rows.sum(axis=0, dtype=jnp.promote_types(rows.dtype, jnp.float32))


def _product_with_ones(rows: jax.Array) -> jax.Array:
    """f32[F]: the sum of rows[M F]. XLA's reduction over leading axes on CPU is several times slower.

    Two rows of ones: its bfloat16 product with a single one is slow.
    """
    ones = jnp.ones((2, rows.shape[0]), rows.dtype)
    return jnp.dot(ones, rows, preferred_element_type=jnp.promote_types(rows.dtype, jnp.float32))[0]
