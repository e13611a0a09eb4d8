"""Policy gradient on the denoising steps of the diffusion transformer: Flow-GRPO.

B rows, S steps that are learned from, M states of the image span, D decoder width, y x latent cells, C channels.

A row of a batch is a run of the stochastic sampler. Every step of it is a Gaussian whose mean the transformer sets, so
it has a density, a ratio and a divergence from the reference, as a token has. The states that condition the
transformer are constants: the token half does not learn here.

Source: Flow-GRPO (arXiv 2505.05470): clipped loss per step, divergence of the means, guidance in learning with its
unconditional half held constant, fewer steps than in sampling images for people.
Differs from the reference: the condition is encoded once for all steps of a run.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from blip3o_jax import masked
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.model import Guidance
from blip3o_jax.config.schema import Count, Range, Weight
from blip3o_jax.diffusion import sde
from blip3o_jax.errors import require
from blip3o_jax.generate import stochastic
from blip3o_jax.generate.ar import TokenSampling
from blip3o_jax.models import blip3o
from blip3o_jax.objectives.policy import clipped_policy, recorded
from blip3o_jax.train.step import LossTerm
from blip3o_jax.types import FlowRollout, Metrics, Params


@dataclasses.dataclass(frozen=True)
class Settings:
    """The stochastic sampler, clipping and penalty."""

    num_inference_steps: Annotated[int, Range(2, 1000)] = 10
    train_steps: Count = 9  # S, of them the first ones, that are learned from
    noise_level: Annotated[float, Range(1e-6, 1e3)] = sde.NOISE_LEVEL
    guidance_scale: Annotated[float, Range(0, 1e3)] = 2.0
    clip: Annotated[float, Range(1e-8, 1)] = 1e-4  # the ratio earns nothing beyond 1 +- clip
    beta: Weight = 0.04  # weight of the divergence from the reference; 0: there is no reference
    sampling: TokenSampling = TokenSampling()  # of the tokens, one set per prompt
    token_guidance_scale: Guidance | None = None  # likewise

    def __post_init__(self):
        most = self.num_inference_steps
        require(self.train_steps <= most, "settings.train_steps", self.train_steps, f"1 to num_inference_steps {most}")

    @property
    def denoising(self) -> stochastic.StochasticDenoising:
        """The sampler's settings."""
        return stochastic.StochasticDenoising(self.num_inference_steps, self.noise_level, self.guidance_scale)


CONDITIONING = ("connector", "vae_connector")  # what may train besides the transformer
COPIED_MODULES: dict[str, str] = {f"reference_{part}": part for part in ("dit", *CONDITIONING)}
"""Subtrees of `extra_modules` that start as copies of the model's parameters at a path."""


def make(model: Blip3oConfig, settings: Settings) -> Callable:
    """The loss function of `train.step`. Parameters: `dit`, connectors, and those of `extra_modules`."""

    def loss(params: Params, batch: FlowRollout, keys: jax.Array) -> tuple[dict, Metrics]:
        del keys  # nothing is drawn
        log_probs, kl = step_values(model, settings, params, batch)
        mask = jnp.broadcast_to(batch.mask[:, None], log_probs.shape)
        policy, metrics = clipped_policy(
            log_probs, batch.old_log_probs, batch.advantage, mask, settings.clip, settings.clip
        )
        terms = {"policy": LossTerm(*masked.metric(policy, mask))}
        if settings.beta:
            terms["kl"] = LossTerm(*masked.metric(kl * batch.kl_scale[:, None], mask), settings.beta)
            metrics["kl"] = masked.metric(kl, mask)
        metrics |= recorded(batch.facts)
        return terms, metrics | {"images": (jnp.float32(mask.shape[0]), jnp.float32(1))}

    return loss


def step_values(
    model: Blip3oConfig, settings: Settings, params: Params, batch: FlowRollout
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities f32[B S] of the steps of runs, and their divergences f32[B S] from the reference (or zeros)."""
    denoising, shared = settings.denoising, (batch.ref_latent, batch.has_ref)
    conditions = stochastic.encode(model, params, batch.states, *shared, denoising)
    reference = {**params, **{part: params[f"reference_{part}"] for part in _copied(model) if settings.beta}}
    reference = jax.lax.stop_gradient(reference)
    before = stochastic.encode(model, reference, batch.states, *shared, denoising) if settings.beta else None

    def body(carry, part):
        step, x, after = part
        there = stochastic.transition(model, params, conditions, x, step, *shared, denoising)
        kl = jnp.zeros(x.shape[0])
        if settings.beta:
            other = stochastic.transition(model, reference, before, x, step, *shared, denoising)
            kl = sde.kl_divergence(there, other)
        return carry, (sde.log_prob(there, after), kl)

    path = batch.latents.swapaxes(0, 1)
    steps = (jnp.arange(settings.train_steps), path[:-1], path[1:])
    _, (log_probs, kl) = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), (), steps)
    return log_probs.T, kl.T


def _copied(model: Blip3oConfig) -> list[str]:
    return [part for part in ("dit", *CONDITIONING) if part in blip3o.modules(model)]


def extra_modules(model: Blip3oConfig, settings: Settings) -> dict[str, Callable[[jax.Array], Params]]:
    """The reference's parts, where there is a penalty."""
    make_part = blip3o.initializers(model)
    return {f"reference_{part}": make_part[part] for part in _copied(model)} if settings.beta else {}
