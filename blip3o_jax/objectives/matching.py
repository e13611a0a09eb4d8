"""Reinforcement learning of the diffusion transformer on the forward process: DiffusionNFT and AWM.

B rows, K noise levels of each, M hidden states of the image span, D decoder width, y x latent cells, C channels.

A row is a finished image, from any sampler and any number of steps. It is noised again to K levels, and the velocity
there is drawn towards it or pushed away, by what the image was worth. No log-probabilities of a sampler and no
guidance are needed. The hidden states that condition the transformer are constants: the token half does not learn here.

`nft`: the policy's velocity is mixed with that of the policy which sampled, once in the direction of the change and
once against it; the first mixture is fitted to the image by the share r, the second by 1 - r.
`awm`: the negative error of the velocity stands for the log-density of an image in a clipped policy loss.

Source: DiffusionNFT (arXiv 2509.16117, equations 8 and 9) and its implementation: errors of predicted images, each
divided by its mean absolute deviation. Advantage Weighted Matching (arXiv 2509.25050).
Differs from the reference:
1. Levels and noises belong to the rollout: the sampling policy's velocity there is computed once and kept, as old
   log-probabilities are. Later updates of the same rollout see the same points.
2. The levels of an image are spread evenly over those of training.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from blip3o_jax import masked
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.model import Guidance
from blip3o_jax.config.schema import Range, Weight
from blip3o_jax.generate import matching
from blip3o_jax.generate.ar import TokenSampling
from blip3o_jax.objectives.flow_grpo import COPIED_MODULES, extra_modules
from blip3o_jax.objectives.policy import clipped_policy, recorded
from blip3o_jax.train.step import LossTerm
from blip3o_jax.types import MatchingRollout, Metrics, Params

__all__ = ["COPIED_MODULES", "AwmSettings", "NftSettings", "awm", "extra_modules", "nft"]

LEAST_DEVIATION = 1e-5  # that errors of predicted images are divided by


@dataclasses.dataclass(frozen=True)
class Settings:
    """What both methods share."""

    draws: Annotated[int, Range(1, 256)] = 4  # K
    beta: Weight = 1e-4  # weight of the squared distance from the reference's velocity; 0: there is no reference
    sampling: TokenSampling = TokenSampling()  # of the tokens, one set per prompt
    token_guidance_scale: Guidance | None = None  # likewise


@dataclasses.dataclass(frozen=True)
class NftSettings(Settings):
    """DiffusionNFT."""

    nft_beta: Annotated[float, Range(1e-3, 1e3)] = 1.0  # how far the mixtures go in and against the direction learnt
    advantage_range: Annotated[float, Range(1e-3, 1e3)] = 5.0  # advantage at which r is 1; at its negative it is 0


@dataclasses.dataclass(frozen=True)
class AwmSettings(Settings):
    """Advantage weighted matching."""

    clip: Annotated[float, Range(1e-8, 1)] = 1e-3  # the ratio earns nothing beyond 1 +- clip


Terms = tuple[dict[str, LossTerm], Metrics]
Policy = Callable[[MatchingRollout, matching.Noised, jax.Array, jax.Array], tuple[jax.Array, dict]]
"""(batch, points, velocity f32[B K y x C], mask bool[B K]) -> loss f32[B K] and metrics."""


def nft(model: Blip3oConfig, settings: NftSettings) -> Callable:
    """The loss function of `train.step` for DiffusionNFT. Parameters as for `flow_grpo`."""

    def policy(batch, points, velocity, mask):
        del mask
        share = jnp.clip(0.5 + batch.advantage / (2 * settings.advantage_range), 0, 1)[:, None]
        change = settings.nft_beta * (velocity - batch.old_velocity)
        towards, away = (image_error(points, batch.old_velocity + sign * change) for sign in (1, -1))
        loss = (share * towards + (1 - share) * away) * settings.advantage_range / settings.nft_beta
        return loss, {"matching_error": masked.metric(squared_mean(velocity - points.target), batch.mask)}

    return _loss(model, settings, policy)


def awm(model: Blip3oConfig, settings: AwmSettings) -> Callable:
    """The loss function of `train.step` for advantage weighted matching. Parameters as for `flow_grpo`."""

    def policy(batch, points, velocity, mask):
        new, old = (-squared_mean(v - points.target) for v in (velocity, batch.old_velocity))
        loss, metrics = clipped_policy(new, old, batch.advantage, mask, settings.clip, settings.clip)
        return loss, metrics | {"matching_error": masked.metric(-new, batch.mask)}

    return _loss(model, settings, policy)


def image_error(points: matching.Noised, velocity: jax.Array) -> jax.Array:
    """Squared error f32[B K] of the images that velocities f32[B K y x C] predict, over its mean absolute error."""
    sigma = points.sigma[:, :, None, None, None]
    error = sigma * (points.target - velocity)  # x - sigma v is the prediction, x - sigma target the image
    deviation = jnp.maximum(jnp.abs(jax.lax.stop_gradient(error)).mean(axis=(2, 3, 4)), LEAST_DEVIATION)
    return squared_mean(error) / deviation


def squared_mean(x: jax.Array) -> jax.Array:
    """f32[B K] of f32[B K y x C]."""
    return jnp.square(x).mean(axis=(2, 3, 4))


def _loss(model: Blip3oConfig, settings: Settings, policy: Policy) -> Callable:
    def loss(params: Params, batch: MatchingRollout, keys: jax.Array) -> Terms:
        del keys  # levels and noises came with the rollout
        points = matching.noised(model, batch.latent, batch.noise, batch.level)
        velocity = matching.velocities(model, params, batch.states, batch.ref_latent, batch.has_ref, points)
        mask = jnp.broadcast_to(batch.mask[:, None], points.sigma.shape)
        value, metrics = policy(batch, points, velocity, mask)
        terms = {"policy": LossTerm(*masked.metric(value, mask))}
        if settings.beta:
            distance = squared_mean(velocity - batch.ref_velocity)
            terms["kl"] = LossTerm(*masked.metric(distance * batch.kl_scale[:, None], mask), settings.beta)
            metrics["kl"] = masked.metric(distance, mask)
        moved = squared_mean(velocity - batch.old_velocity)
        metrics |= {"moved": masked.metric(moved, mask), "images": (jnp.float32(mask.shape[0]), jnp.float32(1))}
        return terms, metrics | recorded(batch.facts)

    return loss
