"""The clipped policy loss that both halves share, its reductions, and what is watched of the ratio.

B rows, N sampled tokens or denoising steps.

Source: PPO (arXiv 1707.06347), equation 7; reductions as in Liger's fused GRPO loss.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from blip3o_jax import masked
from blip3o_jax.types import Metrics

REDUCTIONS = ("grpo", "bnpo", "dr_grpo")
QUANTILES = (0.01, 0.99)  # of the ratio, recorded


def recorded(facts: Mapping[str, jax.Array]) -> Metrics:
    """Returns the metrics of facts of rows, name -> f32[B]; NaN, where a reward does not score a row, do not count."""
    return {name: masked.metric(values, jnp.isfinite(values)) for name, values in facts.items()}


def clipped_policy(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantage: jax.Array,
    mask: jax.Array,
    clip_low: float,
    clip_high: float,
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """The pessimistic one of the plain and the clipped objective, negated.

    Args:
      log_probs: f32[B N] under the parameters that train.
      old_log_probs: f32[B N] under those that sampled.
      advantage: f32[B].
      mask: bool[B N], what counts; the rest gives 0.
      clip_low, clip_high: the ratio earns nothing beyond 1 - clip_low and 1 + clip_high.

    Returns:
      f32[B N], and metrics: share of clipped ratios and their spread.
    """
    ratio, weight = jnp.exp(jnp.where(mask, log_probs - old_log_probs, 0.0)), advantage[:, None]
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    outside = ((ratio < 1 - clip_low) & (weight < 0)) | ((ratio > 1 + clip_high) & (weight > 0))
    metrics = {"clip_fraction": masked.metric(outside, mask), **_ratio_metrics(jax.lax.stop_gradient(ratio), mask)}
    return jnp.where(mask, -jnp.minimum(ratio * weight, clipped * weight), 0.0), metrics


def reduce_tokens(reduction: str, values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sum and weight, f32[] both, of values f32[B N] whose quotient over all rows is the loss.

    Args:
      reduction: of REDUCTIONS.
      mask: bool[B N], tokens that count.
    """
    if reduction == "grpo":
        return masked.masked_mean(values, mask, axis=1).sum(), mask.any(axis=1).sum().astype(jnp.float32)
    if reduction == "bnpo":
        return masked.metric(values, mask)
    return masked.masked_sum(values, mask), jnp.float32(mask.size)


def _ratio_metrics(ratio: jax.Array, mask: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns quantiles and maximum of the ratios of a (micro-)batch where `mask` is True."""
    weight = mask.any().astype(jnp.float32)
    levels = {**{f"ratio_p{round(100 * q):02d}": q for q in QUANTILES}, "ratio_max": 1.0}
    values = jnp.nanquantile(jnp.where(mask, ratio, jnp.nan), jnp.array(list(levels.values())))
    return {name: (jnp.where(weight, value, 0.0), weight) for name, value in zip(levels, values, strict=True)}
