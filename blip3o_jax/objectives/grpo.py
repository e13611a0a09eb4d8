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
        temperature = self.sampling.temperature
        require(temperature > 0, "settings.sampling.temperature", temperature, "more than 0")


def make(model: Blip3oConfig, settings: Settings) -> Callable:
    """Returns the loss function; parameters: `decoder`, and those of `extra_modules`."""

    def loss(params: Params, batch: TokenRollout, keys: jax.Array) -> tuple[dict[str, LossTerm], Metrics]:
        del keys  # deterministic
        log_probs, entropy = scoring.completion_log_probs(model, params, batch, settings.sampling, settings.chunk)
        mask = jnp.broadcast_to(batch.mask[:, None], log_probs.shape)
        terms, metrics = policy_terms(settings, log_probs, mask, batch)
        return terms, metrics | {"entropy": masked.metric(entropy, mask)}

    return loss


def policy_terms(
    settings: Settings, log_probs: jax.Array, mask: jax.Array, batch: TokenRollout
) -> tuple[dict[str, LossTerm], dict[str, tuple[jax.Array, jax.Array]]]:
    """Computes the clipped policy loss and the KL penalty.

    Args:
      log_probs: f32[B N] of the current policy.
      mask: bool[B N], tokens that contribute.
      batch: all but its mask is used.

    Returns:
      Terms `policy` and, if `settings.beta` > 0, `kl`; metrics of `clipped_policy`, and `kl` in nats per token.
    """
    clip = settings.clip_low, settings.clip_high
    policy, metrics = clipped_policy(log_probs, batch.old_log_probs, batch.advantage, mask, *clip)
    terms = {"policy": LossTerm(*reduce_tokens(settings.reduction, policy, mask, batch.mean_rows))}
    if settings.beta:
        away = jnp.where(mask, batch.ref_log_probs - log_probs, 0.0)
        kl = jnp.exp(away) - away - 1
        scaled = reduce_tokens(settings.reduction, kl * batch.kl_scale[:, None], mask, batch.mean_rows)
        terms["kl"] = LossTerm(*scaled, settings.beta)
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
