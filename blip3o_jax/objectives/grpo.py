"""GRPO on image tokens: the clipped policy loss with a KL penalty towards a frozen reference decoder.

B rows, T prompt positions, N sampled tokens.

Batches are rollouts of the current policy (`rl/rollout.py`) with the log-probabilities of the sampling policy and of
the reference. Only the decoder is trained: images and rewards enter through the advantages.

Source: GRPO (arXiv 2402.03300), the three reductions of Liger's fused GRPO loss, Dr. GRPO (arXiv 2503.20783).
Differs from the reference:
1. Log-probabilities are those of the sampling distribution, including truncation and temperature.
2. Groups with equal rewards are left out of the loss; the reference keeps their KL term.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from blip3o_jax import flops, masked
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.model import Guidance
from blip3o_jax.config.schema import Count, OneOf, Range, Weight
from blip3o_jax.errors import require
from blip3o_jax.generate import scoring
from blip3o_jax.generate.ar import TokenSampling
from blip3o_jax.models import blip3o
from blip3o_jax.objectives.objective import Objective
from blip3o_jax.objectives.policy import REDUCTIONS, clipped_policy, reduce_tokens
from blip3o_jax.train.step import LossTerm
from blip3o_jax.types import Metrics, Params, TokenRollout


@dataclasses.dataclass(frozen=True)
class Settings:
    """Clipping, KL penalty and the sampling distribution."""

    clip_low: Annotated[float, Range(1e-6, 1)] = 0.2  # lower bound of the ratio: 1 - clip_low
    clip_high: Annotated[float, Range(1e-6, 1e3)] = 0.2  # upper bound of the ratio: 1 + clip_high
    beta: Weight = 1e-3  # weight of the KL divergence from the reference decoder; 0: no reference
    reduction: Annotated[str, OneOf(*REDUCTIONS)] = "bnpo"  # see `policy.reduce_tokens`
    sampling: TokenSampling = TokenSampling(top_k=0, top_p=1.0)
    token_guidance_scale: Guidance | None = None  # of the sampling distribution; None: the model's default for the task
    rescore: bool = True  # compute the old log-probabilities as the update does; False: use those of the sampler, which
    # saves a pass
    chunk: Count = 128  # positions whose logits are in memory at a time

    def __post_init__(self):
        how = self.sampling
        require(how.temperature > 0, "settings.sampling.temperature", how.temperature, "more than 0")
        require(how.top_k >= 0, "settings.sampling.top_k", how.top_k, "0 (all) or more")
        require(0 < how.top_p <= 1, "settings.sampling.top_p", how.top_p, "a share in (0, 1]")


def make(model: Blip3oConfig, settings: Settings) -> Callable:
    """Returns the loss function; parameters: `decoder`, and those of `extra_modules`."""

    def loss(params: Params, batch: TokenRollout, keys: jax.Array) -> tuple[dict[str, LossTerm], Metrics]:
        del keys  # deterministic
        sampling, chunk = settings.sampling, settings.chunk
        log_probs, entropy = scoring.completion_log_probs(model, params, batch, sampling, chunk)
        others = batch.old_log_probs, batch.ref_log_probs, batch.advantage, batch.mask, batch.kl_scale, batch.mean_rows
        terms, metrics = policy_terms(settings, log_probs, *others)
        return terms, metrics | {"entropy": masked.metric(entropy, batch.mask)}

    return loss


def policy_terms(
    settings: Settings,
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    ref_log_probs: jax.Array | None,
    advantage: jax.Array,
    mask: jax.Array,
    kl_scale: jax.Array,
    mean_rows: int | None = None,
) -> tuple[dict[str, LossTerm], dict[str, tuple[jax.Array, jax.Array]]]:
    """Computes the clipped policy loss and the KL penalty.

    Args:
      settings: clipping, penalty and reduction.
      log_probs: f32[B N] of the current policy.
      old_log_probs: f32[B N] of the policy that sampled.
      ref_log_probs: f32[B N] of the reference; may be None if `settings.beta` is 0.
      advantage: f32[B].
      mask: bool[B N], tokens that contribute.
      kl_scale: f32[B], multiplies `settings.beta`.
      mean_rows: see `policy.reduce_tokens`.

    Returns:
      Terms `policy` and, if `settings.beta` > 0, `kl`; metrics of `clipped_policy`, and `kl` in nats per token.
    """
    policy, metrics = clipped_policy(log_probs, old_log_probs, advantage, mask, settings.clip_low, settings.clip_high)
    terms = {"policy": LossTerm(*reduce_tokens(settings.reduction, policy, mask, mean_rows))}
    if settings.beta:
        away = jnp.where(mask, ref_log_probs - log_probs, 0.0)
        kl = jnp.exp(away) - away - 1
        scaled = kl * kl_scale[:, None]
        terms["kl"] = LossTerm(*reduce_tokens(settings.reduction, scaled, mask, mean_rows), settings.beta)
        metrics["kl"] = masked.metric(kl, mask)
    return terms, metrics


def extra_modules(model: Blip3oConfig, settings: Settings) -> dict[str, Callable[[jax.Array], Params]]:
    """Returns the initialiser of the reference decoder, if there is a KL penalty."""
    return {"reference": blip3o.initializers(model)["decoder"]} if settings.beta else {}


def flops_per_step(model: Blip3oConfig, settings: Settings, layout: Any, rows: int, trainable: Params) -> float:
    """Counts one update over all rows, without the rollout; prompts that samples share count once per sample."""
    del trainable
    return 3 * rows * (flops.decoder(model.decoder, layout.length) + flops.image_head(model))


OBJECTIVE = Objective(
    Settings,
    make,
    extra_modules=extra_modules,
    copied={"reference": "decoder"},
    flops_per_step=flops_per_step,
)
