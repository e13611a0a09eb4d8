"""Masked sums and means, and metrics as pairs of sum and weight.

A metric is a pair (weighted sum f32[], weight f32[]). Adding pairs over micro-batches, steps or evaluation batches and
dividing once gives the exact average, however uneven the parts.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from blip3o_jax.types import Metrics


def masked_sum(values: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Sums `values` in float32 where `mask` (broadcast from the left) is True; NaN elsewhere are ignored."""
    mask = _aligned(mask, values)
    return jnp.sum(jnp.where(mask, values.astype(jnp.float32), 0.0), axis=axis)


def masked_mean(values: jax.Array, mask: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Averages `values` in float32 where `mask` (broadcast from the left) is True; 0 if it is True nowhere."""
    count = jnp.sum(jnp.broadcast_to(_aligned(mask, values), values.shape).astype(jnp.float32), axis=axis)
    return ratio(masked_sum(values, mask, axis), count)


def metric(values: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Returns the metric (sum, count) of `values[...]` where `mask` (broadcast from the left) is True."""
    mask = jnp.ones(values.shape, bool) if mask is None else _aligned(mask, values)
    return masked_sum(values, mask), jnp.sum(jnp.broadcast_to(mask, values.shape).astype(jnp.float32))


def ratio(total: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns `total / weight`, 0 where the weight is 0; the gradient is finite there."""
    return jnp.where(weight == 0, 0.0, total / jnp.where(weight == 0, 1.0, weight))


def add_metrics(left: Metrics, right: Metrics) -> dict[str, tuple[Any, Any]]:
    """Adds two sets of metrics; a name may occur in one of them only."""
    names = [*left, *(name for name in right if name not in left)]
    zero = (0.0, 0.0)
    return {
        name: tuple(a + b for a, b in zip(left.get(name, zero), right.get(name, zero), strict=True)) for name in names
    }


def averages(metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """Returns name -> average on the host, without names of weight 0."""
    host = {name: (float(total), float(weight)) for name, (total, weight) in metrics.items()}
    return {name: total / weight for name, (total, weight) in host.items() if weight != 0}


def _aligned(mask: jax.Array, values: jax.Array) -> jax.Array:
    return mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
