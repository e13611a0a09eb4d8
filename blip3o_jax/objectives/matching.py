"""Reinforcement learning of the diffusion transformer on the forward process: DiffusionNFT and AWM.

B rows, K noise levels per row, M hidden states of the image span, D decoder width, y x latent cells, C channels.

A row is a generated image, from any sampler with any number of steps. It is noised to K levels, and the advantage
weights the velocity error there. Neither log-probabilities of a sampler nor guidance are needed. The hidden states that
condition the transformer are constants: the decoder is not trained.

`nft`: two mixtures of the current and the sampling policy's velocity, along and against the direction of the update,
are fitted to the image with the weights r and 1 - r.
`awm`: the negative velocity error replaces the log-density of an image in the clipped policy loss.

Source: DiffusionNFT (arXiv 2509.16117, equations 8 and 9) and its implementation, which divides the error of each
predicted image by its mean absolute deviation; Advantage Weighted Matching (arXiv 2509.25050).
Differs from the reference:
1. Noise levels and noises are part of the rollout, so the sampling policy's velocities are computed once, as old
   log-probabilities are. All updates of a rollout use the same points.
2. The noise levels of an image are evenly spaced over those of training.
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
from blip3o_jax.objectives.objective import Objective
from blip3o_jax.objectives.policy import clipped_policy
from blip3o_jax.train.step import LossTerm
from blip3o_jax.types import MatchingRollout, Metrics, Params

Draws = Annotated[int, Range(1, 256)]
Strength = Annotated[float, Range(1e-3, 1e3)]
LEAST_DEVIATION = 1e-5  # lower bound of the divisor of an image's error


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of both methods."""

    draws: Draws = 4  # K
    beta: Weight = 1e-4  # weight of the squared distance from the reference's velocity; 0: no reference
    sampling: TokenSampling = TokenSampling()  # of the image tokens, one set per prompt
    token_guidance_scale: Guidance | None = None  # of the image tokens; None: the model's default for the task


@dataclasses.dataclass(frozen=True)
class NftSettings(Settings):
    """DiffusionNFT."""

    nft_beta: Strength = 1.0  # distance of the mixtures from the sampling policy, in updates
    advantage_range: Strength = 5.0  # r rises linearly from 0 to 1 over [-x, x]


@dataclasses.dataclass(frozen=True)
class AwmSettings(Settings):
    """Advantage weighted matching."""

    clip: Annotated[float, Range(1e-8, 1)] = 1e-3  # the ratio is clipped to [1 - clip, 1 + clip]


Terms = tuple[dict[str, LossTerm], Metrics]
Policy = Callable[[MatchingRollout, matching.Noised, jax.Array, jax.Array], tuple[jax.Array, dict]]
"""(batch, points, velocity f32[B K y x C], mask bool[B K]) -> loss f32[B K] and metrics."""


def nft(model: Blip3oConfig, settings: NftSettings) -> Callable:
    """Returns the loss function of DiffusionNFT; parameters as for `flow_grpo`."""

    def policy(batch, points, velocity, mask):
        del mask
        share = jnp.clip(0.5 + batch.advantage / (2 * settings.advantage_range), 0, 1)[:, None]
        change = settings.nft_beta * (velocity - batch.old_velocity)
        towards, away = (image_error(points, batch.old_velocity + sign * change) for sign in (1, -1))
        loss = (share * towards + (1 - share) * away) * settings.advantage_range / settings.nft_beta
        return loss, {"matching_error": masked.metric(squared_mean(velocity - points.target), batch.mask)}

    return _loss(model, settings, policy)


def awm(model: Blip3oConfig, settings: AwmSettings) -> Callable:
    """Returns the loss function of advantage weighted matching; parameters as for `flow_grpo`."""

    def policy(batch, points, velocity, mask):
        new, old = (-squared_mean(v - points.target) for v in (velocity, batch.old_velocity))
        loss, metrics = clipped_policy(new, old, batch.advantage, mask, settings.clip, settings.clip)
        return loss, metrics | {"matching_error": masked.metric(-new, batch.mask)}

    return _loss(model, settings, policy)


def image_error(points: matching.Noised, velocity: jax.Array) -> jax.Array:
    """Returns the squared error f32[B K] of the images predicted by velocities f32[B K y x C], over its mean size."""
    sigma = points.sigma[:, :, None, None, None]
    error = sigma * (points.target - velocity)  # of x - sigma v, the predicted image
    deviation = jnp.maximum(jnp.abs(jax.lax.stop_gradient(error)).mean(axis=(2, 3, 4)), LEAST_DEVIATION)
    return squared_mean(error) / deviation


def squared_mean(x: jax.Array) -> jax.Array:
    """Returns the mean square f32[B K] of f32[B K y x C]."""
    return jnp.square(x).mean(axis=(2, 3, 4))


def _loss(model: Blip3oConfig, settings: Settings, policy: Policy) -> Callable:
    def loss(params: Params, batch: MatchingRollout, keys: jax.Array) -> Terms:
        del keys  # noise levels and noises are part of the rollout
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
        return terms, metrics | {"moved": masked.metric(moved, mask)}

    return loss


NFT = Objective(NftSettings, nft, extra_modules=extra_modules, copied=COPIED_MODULES)
AWM = Objective(AwmSettings, awm, extra_modules=extra_modules, copied=COPIED_MODULES)
