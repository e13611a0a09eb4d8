"""Reads and writes slices of arrays that start at one index per row (B rows), or at one index for all rows."""

import jax
import jax.numpy as jnp


def read_window(array: jax.Array, start: jax.Array, size: int, axis: int = 1) -> jax.Array:
    """Returns `size` entries of every row of `array[B ...]` along an axis, from `start` (i32[] or i32[B]) on."""
    if jnp.ndim(start) == 0:
        return jax.lax.dynamic_slice_in_dim(array, start, size, axis)
    return jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, size, axis - 1))(array, start)


def write_window(array: jax.Array, values: jax.Array, start: jax.Array, axis: int = 1) -> jax.Array:
    """Returns `array[B ...]` with `values` of its dtype written along an axis, from `start` (i32[] or i32[B]) on."""
    if jnp.ndim(start) == 0:
        return jax.lax.dynamic_update_slice_in_dim(array, values, start, axis)

    def write(row, values, start):
        return jax.lax.dynamic_update_slice_in_dim(row, values, start, axis - 1)

    return jax.vmap(write)(array, values, start)
