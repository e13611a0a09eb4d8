"""Reads and writes slices of arrays that start at one index per row (B rows), or at one index for all rows.

Slices must lie within the array.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from blip3o_jax.nn.kernels import by_platform

WITHIN = {"mode": "promise_in_bounds", "unique_indices": True, "indices_are_sorted": True}


def read_window(array: jax.Array, start: jax.Array, size: int, axis: int = 1) -> jax.Array:
    """Returns `size` entries of every row of `array[B ...]` along an axis, from `start` (i32[] or i32[B]) on."""
    start = _common(start)
    if start.ndim == 0:
        return jax.lax.dynamic_slice_in_dim(array, start, size, axis)

    def sliced(row, start):
        return jax.lax.dynamic_slice_in_dim(row, start, size, axis - 1)

    def by_entry(row, start):
        return row.at[_entries(start, size, axis - 1)].get(**WITHIN)

    return _for_rows(sliced, by_entry, array, start)


def write_window(array: jax.Array, values: jax.Array, start: jax.Array, axis: int = 1) -> jax.Array:
    """Returns `array[B ...]` with `values` of its dtype written along an axis, from `start` (i32[] or i32[B]) on."""
    start = _common(start)

    def whole(array, values, start):
        return jax.lax.dynamic_update_slice_in_dim(array, values, start, axis)

    def conditional(array, values, start):
        # XLA on CPU would repeat the write for each use of its result, on a copy of the array (not in bfloat16)
        return jax.lax.cond(start >= 0, whole, lambda array, *_: array, array, values, start)

    if start.ndim == 0:
        return by_platform(
            array, values, start, cpu=whole if array.dtype == jnp.bfloat16 else conditional, default=whole
        )

    def sliced(row, values, start):
        return jax.lax.dynamic_update_slice_in_dim(row, values, start, axis - 1)

    def by_entry(row, values, start):
        return row.at[_entries(start, values.shape[axis - 1], axis - 1)].set(values, **WITHIN)

    return _for_rows(sliced, by_entry, array, values, start)


def _common(start: jax.Array) -> jax.Array:
    """Returns the index of a single row as one for all rows: its window is a slice, without a gather or scatter."""
    start = jnp.asarray(start)
    return start.reshape(()) if start.size == 1 else start


def _for_rows(sliced: Callable, by_entry: Callable, *operands: jax.Array) -> jax.Array:
    """Applies a function to every row. For a TPU, XLA makes a loop over the rows of slices with a start each."""
    return by_platform(*operands, tpu=jax.vmap(by_entry), default=jax.vmap(sliced))


def _entries(start: jax.Array, size: int, axis: int) -> tuple:
    return (*(slice(None),) * axis, start + jnp.arange(size))
