"""Stochastic denoising with tractable step densities, for reinforcement learning.

B images, M hidden states of the image span, D decoder width, y x latent cells, C latent channels, S steps.

Source: Flow-GRPO (arXiv 2505.05470).
Differs from the reference:
1. Computation that depends on the condition only runs once for all steps, in training and in sampling.
2. Guidance is part of the density in both; training treats the unconditional half as a constant.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.schema import Range
from blip3o_jax.diffusion import flow, guidance, sde
from blip3o_jax.generate import paint, stages
from blip3o_jax.models import blip3o
from blip3o_jax.types import Params


@dataclasses.dataclass(frozen=True)
class StochasticDenoising:
    """Settings of stochastic denoising."""

    num_inference_steps: Annotated[int, Range(2, 1000)] = 10  # S
    noise_level: Annotated[float, Range(1e-6, 1e3)] = sde.NOISE_LEVEL
    guidance_scale: Annotated[float, Range(0, 1e3)] = 2.0  # 1 turns guidance off


def transitions(
    config: Blip3oConfig,
    params: Params,
    hidden: jax.Array,
    ref_latent: jax.Array | None,
    has_ref: jax.Array | None,
    settings: StochasticDenoising,
) -> Callable[[jax.Array, jax.Array], sde.Transition]:
    """Encodes the conditions of images; arguments as in `sample`.

    Returns:
      (latents f32[B y x C], step i32[] from 0 to S - 1) -> distribution of the latents after the step, differentiable
      through the conditional half only.
    """
    beside, constant = paint.masked(ref_latent, has_ref), jax.lax.stop_gradient(params)
    condition = blip3o.make_condition(config, params, hidden, beside, has_ref)
    own, null = paint.encode(config, params, condition), None
    if settings.guidance_scale != 1:
        null = paint.unconditional(config, constant, condition.shape[1])
    sigmas = jnp.asarray(flow.inference_sigmas(config.schedule, settings.num_inference_steps))

    def transition(x: jax.Array, step: jax.Array) -> sde.Transition:
        velocity = blip3o.velocity(config, params, x, sigmas[step], (own,), beside)
        if null is not None:
            base = blip3o.velocity(config, constant, x, sigmas[step], (null,), beside)
            velocity = guidance.extrapolate(base, velocity, settings.guidance_scale)
        return sde.transition(x, velocity, step, sigmas, settings.noise_level)

    return transition


@functools.partial(jax.jit, static_argnames=("config", "settings", "size"))
def sample(
    config: Blip3oConfig,
    params: Params,
    hidden: jax.Array,
    ref_latent: jax.Array | None,
    has_ref: jax.Array | None,
    keys: jax.Array,
    settings: StochasticDenoising,
    size: tuple[int, int],
) -> tuple[jax.Array, jax.Array]:
    """Samples latents by stochastic denoising.

    Args:
      hidden: [B M D], hidden states of the image span.
      ref_latent: f32[B y x C], reference latents; None if the model does not use them.
      has_ref: bool[B]; None likewise.
      keys: key[B] of the images.
      size: image height and width in pixels.

    Returns:
      Latents f32[B 1+S y x C] before the first and after every step, and log-probabilities f32[B S] of the steps.
    """
    params = blip3o.with_whole(config, params, "dit")
    transition = transitions(config, params, hidden, ref_latent, has_ref, settings)
    latents = paint.noise(config, stages.stream_of(keys, stages.NOISE_STREAM), *size)
    keys = stages.stream_of(keys, stages.STEP_STREAM)

    def body(x, step):
        there = transition(x, step)
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), x.shape[1:]))(keys)
        after = sde.draw(there, noise)
        return after, (after, sde.log_prob(there, after))

    _, (path, log_probs) = jax.lax.scan(body, latents, jnp.arange(settings.num_inference_steps))
    return jnp.concatenate([latents[:, None], path.swapaxes(0, 1)], axis=1), log_probs.T
