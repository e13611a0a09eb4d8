"""Noised latents and velocities at them, for forward-process reinforcement learning.

B images, K noise levels of each, M hidden states of the image span, D decoder width, y x latent cells, C channels.

Source: DiffusionNFT (arXiv 2509.16117), Advantage Weighted Matching (arXiv 2509.25050).
"""

import functools

import flax.struct
import jax

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.diffusion import flow
from blip3o_jax.generate import paint, stages
from blip3o_jax.models import blip3o
from blip3o_jax.types import Params


@flax.struct.dataclass
class Noised:
    """Points on the straight paths from images to noise."""

    x: jax.Array  # f32[B K y x C]
    sigma: jax.Array  # f32[B K], noise levels
    target: jax.Array  # f32[B K y x C], velocity of the path, noise - data


@functools.partial(jax.jit, static_argnames="config")
def noised(config: Blip3oConfig, latent: jax.Array, noise: jax.Array, u: jax.Array) -> Noised:
    """Adds noise f32[B K y x C] to latents f32[B y x C]; u f32[B K] in [0, 1) selects levels of the schedule."""
    along = jax.vmap(functools.partial(flow.noisy_example, config.schedule), (None, 1, 1), 1)
    return Noised(*along(latent, noise, u))


@functools.partial(jax.jit, static_argnames="config")
def velocities(
    config: Blip3oConfig,
    params: Params,
    hidden: jax.Array,
    ref_latent: jax.Array | None,
    has_ref: jax.Array | None,
    points: Noised,
) -> jax.Array:
    """Predicts velocities f32[B K y x C] without guidance, one noise level in memory at a time.

    Args:
      hidden: [B M D], hidden states of the image span.
      ref_latent: f32[B y x C], reference latents; None if the model does not use them.
      has_ref: bool[B]; None likewise.
    """
    beside = paint.masked(ref_latent, has_ref)
    condition = paint.encode(config, params, blip3o.make_condition(config, params, hidden, beside, has_ref))

    def level(carry, point):
        return carry, blip3o.velocity(config, params, *point, (condition,), beside)

    levels = points.x.swapaxes(0, 1), points.sigma.T
    _, result = jax.lax.scan(jax.checkpoint(level, prevent_cse=False), (), levels)
    return result.swapaxes(0, 1)


@functools.partial(jax.jit, static_argnames="draws")
def draw(latent: jax.Array, keys: jax.Array, draws: int) -> tuple[jax.Array, jax.Array]:
    """Draws noise f32[B K y x C] and levels u f32[B K] (`flow.spread_levels`) for latents f32[B y x C] and key[B]."""

    def row(key):
        level, noise = jax.random.split(key)
        return jax.random.normal(noise, (draws, *latent.shape[1:])), flow.spread_levels(level, draws)

    return jax.vmap(row)(stages.stream_of(keys, stages.MATCHING_STREAM))
