"""Masked sums and means, and the algebra of metrics: sums and weights travel apart, averages are formed once.

A metric is a pair (weighted sum f32[], weight f32[]), so that adding pairs over micro-batches, steps or evaluation
batches and dividing at the end gives the average over everything, however uneven the parts were.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from blip3o_jax.types import Metrics


def masked_sum(values: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Sum in float32 of `values` where `mask` (broadcast from the left) holds; masked-out NaN do not count."""
    mask = _aligned(mask, values)
    return jnp.sum(jnp.where(mask, values.astype(jnp.float32), 0.0), axis=axis)


def masked_mean(values: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Mean in float32 of `values` where `mask` (broadcast from the left) holds; 0 where it holds nowhere."""
    count = jnp.sum(jnp.broadcast_to(_aligned(mask, values), values.shape).astype(jnp.float32), axis=axis)
    return ratio(masked_sum(values, mask, axis), count)


def metric(values: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The metric of `values[...]` where `mask` (broadcast from the left) holds: (sum, count)."""
    mask = jnp.ones(values.shape, bool) if mask is None else _aligned(mask, values)
    return masked_sum(values, mask), jnp.sum(jnp.broadcast_to(mask, values.shape).astype(jnp.float32))


def ratio(total: jax.Array, weight: jax.Array) -> jax.Array:
    """`total / weight`, 0 where the weight is 0; its gradient is finite there too."""
    return jnp.where(weight == 0, 0.0, total / jnp.where(weight == 0, 1.0, weight))


def add_metrics(left: Metrics, right: Metrics) -> dict[str, tuple[Any, Any]]:
    """The metrics of both parts together; a name may be in one of them only."""
    names = [*left, *(name for name in right if name not in left)]
    zero = (0.0, 0.0)
    return {
        name: tuple(a + b for a, b in zip(left.get(name, zero), right.get(name, zero), strict=True)) for name in names
    }


def averages(metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """Name -> average, on the host; names whose weight is 0 are left out."""
    host = {name: (float(total), float(weight)) for name, (total, weight) in metrics.items()}
    return {name: total / weight for name, (total, weight) in host.items() if weight != 0}


def _aligned(mask: jax.Array, values: jax.Array) -> jax.Array:
    mask = jnp.asarray(mask).astype(bool)
    return mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
