"""The clipped policy loss, its reductions over tokens, and statistics of the probability ratio.

B rows, N sampled tokens or denoising steps.

Source: PPO (arXiv 1707.06347), equation 7; reductions of Liger's fused GRPO loss.
"""

import jax
import jax.numpy as jnp

from blip3o_jax import masked

REDUCTIONS = ("grpo", "bnpo", "dr_grpo")
QUANTILES = (0.01, 0.99)  # of the ratio, for the log


def clipped_policy(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantage: jax.Array,
    mask: jax.Array,
    clip_low: float,
    clip_high: float,
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
    """Computes the negated minimum of the unclipped and the clipped objective.

    Args:
      log_probs: f32[B N] of the current policy.
      old_log_probs: f32[B N] of the policy that sampled.
      advantage: f32[B].
      mask: bool[B N], tokens or steps that contribute; the loss is 0 elsewhere.
      clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].

    Returns:
      Loss f32[B N], and metrics: `clip_fraction`, quantiles of the ratio and `ratio_max`.
    """
    ratio, weight = jnp.exp(jnp.where(mask, log_probs - old_log_probs, 0.0)), advantage[:, None]
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    outside = ((ratio < 1 - clip_low) & (weight < 0)) | ((ratio > 1 + clip_high) & (weight > 0))
    metrics = {"clip_fraction": masked.metric(outside, mask), **_ratio_metrics(jax.lax.stop_gradient(ratio), mask)}
    return jnp.where(mask, -jnp.minimum(ratio * weight, clipped * weight), 0.0), metrics


def reduce_tokens(
    reduction: str, values: jax.Array, mask: jax.Array, mean_rows: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Reduces token losses to a sum f32[] and a weight f32[]; summed over all rows, their quotient is the loss.

    Args:
      reduction: "grpo" (mean over rows of means over tokens), "bnpo" (mean over tokens) or "dr_grpo" (sum over B * N).
      values: f32[B N].
      mask: bool[B N], tokens that contribute.
      mean_rows: for "dr_grpo" instead of B, where rows without a token that contributes were left out.
    """
    if reduction == "grpo":
        return masked.masked_mean(values, mask, axis=1).sum(), mask.any(axis=1).sum().astype(jnp.float32)
    if reduction == "bnpo":
        return masked.metric(values, mask)
    return masked.masked_sum(values, mask), jnp.float32((mean_rows or len(mask)) * mask.shape[1])


def _ratio_metrics(ratio: jax.Array, mask: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Returns quantiles and maximum of the ratios of a (micro-)batch where `mask` is True."""
    weight = mask.any().astype(jnp.float32)
    levels = {**{f"ratio_p{round(100 * q):02d}": q for q in QUANTILES}, "ratio_max": 1.0}
    values = jnp.nanquantile(jnp.where(mask, ratio, jnp.nan), jnp.array(list(levels.values())))
    return {name: (jnp.where(weight, value, 0.0), weight) for name, value in zip(levels, values, strict=True)}
