"""Policy gradient on image tokens: the clipped loss of GRPO with a penalty on leaving a frozen reference decoder.

B rows, T prompt positions, N sampled tokens.

The batches are rollouts of the current parameters (`rl/rollout.py`), which bring the log-probabilities that the
update starts from and those of the reference. Only the tokens carry gradients: images and rewards were computed on
the way to the advantages, and the diffusion half is not touched.

Source: GRPO (arXiv 2402.03300), Liger's fused GRPO loss (its three reductions), Dr. GRPO (arXiv 2503.20783).
Differs from the reference:
1. Log-probabilities are those of the distribution that was sampled from, truncation and temperature included.
2. Groups whose rewards are all equal leave the loss altogether; the reference keeps their divergence.
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
from blip3o_jax.generate.settings import guides_tokens
from blip3o_jax.models import blip3o
from blip3o_jax.objectives.policy import REDUCTIONS, clipped_policy, recorded, reduce_tokens
from blip3o_jax.train.step import LossTerm
from blip3o_jax.types import Metrics, Params, TokenRollout


@dataclasses.dataclass(frozen=True)
class Settings:
    """Clipping, penalty and the distribution that is sampled from."""

    clip_low: Annotated[float, Range(1e-6, 1)] = 0.2  # the ratio stays above 1 - clip_low at negative advantages
    clip_high: Annotated[float, Range(1e-6, 1e3)] = 0.2  # and below 1 + clip_high where it is positive
    beta: Weight = 1e-3  # weight of the divergence from the reference decoder; 0: there is no reference
    reduction: Annotated[str, OneOf(*REDUCTIONS)] = "bnpo"  # mean over tokens; grpo: over rows of means;
    # dr_grpo: over rows of sums / N
    sampling: TokenSampling = TokenSampling(top_k=0, top_p=1.0)
    token_guidance_scale: Guidance | None = None  # of the tokens that are sampled, and of the distribution that learns;
    # default: the checkpoint's for the task
    rescore: bool = True  # ratios compare with the trainer's log-probabilities of the samples, computed before the
    # update; False: with those that the sampler drew at, which saves a pass
    chunk: Count = 128  # positions whose scores are held at a time

    def __post_init__(self):
        how = self.sampling
        require(how.temperature > 0, "settings.sampling.temperature", how.temperature, "more than 0")
        require(how.top_k >= 0, "settings.sampling.top_k", how.top_k, "0 (all) or more")
        require(0 < how.top_p <= 1, "settings.sampling.top_p", how.top_p, "a share in (0, 1]")


COPIED_MODULES: dict[str, str] = {"reference": "decoder"}
"""Subtrees of `extra_modules` that start as copies of the model's parameters at a path."""


def make(model: Blip3oConfig, settings: Settings) -> Callable:
    """The loss function of `train.step`. Parameters: `decoder`, and those of `extra_modules`."""

    def loss(params: Params, batch: TokenRollout, keys: jax.Array) -> tuple[dict[str, LossTerm], Metrics]:
        del keys  # nothing is drawn
        log_probs, entropy = scoring.completion_log_probs(
            model,
            params,
            batch,
            settings.sampling,
            settings.chunk,
        )
        terms, metrics = policy_terms(
            settings,
            log_probs,
            batch.old_log_probs,
            batch.ref_log_probs,
            batch.advantage,
            batch.mask,
            batch.kl_scale,
        )
        rows, one = jnp.float32(batch.mask.shape[0]), jnp.float32(1)
        metrics |= {"entropy": masked.metric(entropy, batch.mask)}
        metrics |= recorded(batch.facts)
        return terms, metrics | {"images": (rows, one), "tokens": (rows * log_probs.shape[1], one)}

    return loss


def policy_terms(
    settings: Settings,
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    ref_log_probs: jax.Array | None,
    advantage: jax.Array,
    mask: jax.Array,
    kl_scale: jax.Array,
) -> tuple[dict[str, LossTerm], dict[str, tuple[jax.Array, jax.Array]]]:
    """The clipped policy loss and the divergence from the reference.

    Args:
      log_probs: f32[B N] under the parameters that train.
      old_log_probs: f32[B N] under those that sampled.
      ref_log_probs: f32[B N] of the reference; needed where `settings.beta` is more than 0.
      advantage: f32[B].
      mask: bool[B N], tokens that count.
      kl_scale: f32[B], multiplies `settings.beta`.

    Returns:
      Terms `policy` and, with a reference, `kl`; metrics: divergence, clipped share and the ratio's spread.
    """
    policy, metrics = clipped_policy(log_probs, old_log_probs, advantage, mask, settings.clip_low, settings.clip_high)
    terms = {"policy": LossTerm(*reduce_tokens(settings.reduction, policy, mask))}
    if settings.beta:
        away = jnp.where(mask, ref_log_probs - log_probs, 0.0)
        kl = jnp.exp(away) - away - 1
        terms["kl"] = LossTerm(*reduce_tokens(settings.reduction, kl * kl_scale[:, None], mask), settings.beta)
        metrics["kl"] = masked.metric(kl, mask)
    return terms, metrics


def extra_modules(model: Blip3oConfig, settings: Settings) -> dict[str, Callable[[jax.Array], Params]]:
    """The reference decoder, where there is a penalty."""
    return {"reference": blip3o.initializers(model)["decoder"]} if settings.beta else {}


def flops_per_step(model: Blip3oConfig, settings: Settings, layout: Any, rows: int, trainable: Params) -> float:
    """Floating-point operations of one update of all rows, as if none shared a prompt, without those of the rollout."""
    del trainable
    guided = guides_tokens(model, settings.token_guidance_scale, layout.max_references > 0)
    passes = 3 + guided  # forward, and twice as much backward; the unconditional half has no gradient
    return passes * rows * (flops.decoder(model.decoder, layout.length) + flops.image_head(model))
