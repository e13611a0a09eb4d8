"""Finished latents noised again, and the velocity there: what forward-process reinforcement learning learns from.

B images, K noise levels of each, M hidden states of the image span, D decoder width, y x latent cells, C channels.

Source: DiffusionNFT (arXiv 2509.16117), Advantage Weighted Matching (arXiv 2509.25050).
"""

import functools

import flax.struct
import jax

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.diffusion import flow
from blip3o_jax.generate import paint, stages, stochastic
from blip3o_jax.models import blip3o
from blip3o_jax.types import Params


@flax.struct.dataclass
class Noised:
    """Points of the straight paths from images to noise."""

    x: jax.Array  # f32[B K y x C]
    sigma: jax.Array  # f32[B K], noise levels
    target: jax.Array  # f32[B K y x C], velocity of the path: noise - data


@functools.partial(jax.jit, static_argnames="config")
def noised(config: Blip3oConfig, latent: jax.Array, noise: jax.Array, u: jax.Array) -> Noised:
    """Noises latents f32[B y x C].

    Args:
      noise: f32[B K y x C].
      u: f32[B K] in [0, 1), picks the levels from those of training.
    """
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
    """Velocity f32[B K y x C] under hidden states [B M D], without guidance; one level in memory at a time.

    Args:
      ref_latent: f32[B y x C] of references, and has_ref: bool[B], where the model takes them.
    """
    beside = stochastic.masked(ref_latent, has_ref)
    condition = paint.encode(config, params, blip3o.make_condition(config, params, hidden, beside, has_ref))

    def level(carry, point):
        return carry, blip3o.velocity(config, params, *point, (condition,), beside)

    levels = points.x.swapaxes(0, 1), points.sigma.T
    _, result = jax.lax.scan(jax.checkpoint(level, prevent_cse=False), (), levels)
    return result.swapaxes(0, 1)


@functools.partial(jax.jit, static_argnames="draws")
def draw(latent: jax.Array, keys: jax.Array, draws: int) -> tuple[jax.Array, jax.Array]:
    """Noise f32[B K y x C] and levels u f32[B K] for latents f32[B y x C] and key[B] of their images.

    Levels of an image: see `flow.spread_levels`.
    """

    def row(key):
        level, noise = jax.random.split(key)
        return jax.random.normal(noise, (draws, *latent.shape[1:])), flow.spread_levels(level, draws)

    return jax.vmap(row)(stages.stream_of(keys, stages.MATCHING_STREAM))
