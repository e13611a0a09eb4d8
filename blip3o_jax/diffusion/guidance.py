"""Classifier-free guidance of logits and velocities (arXiv 2207.12598).

B batch, G groups.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from blip3o_jax.diffusion.samplers import Denoise

GroupedDenoise = Callable[[jax.Array, jax.Array, tuple[Any, ...], jax.Array | None], jax.Array]
"""(x f32[G*B ...], sigma f32[], one condition per group, until f32[] or None) -> velocity f32[G*B ...]"""


def extrapolate(base: jax.Array, value: jax.Array, scale: float | jax.Array) -> jax.Array:
    """Returns base + scale * (value - base), exactly `value` where the scale is 1."""
    return jnp.where(scale == 1, value, base + scale * (value - base))


def guided(denoise: GroupedDenoise, conditions: tuple[Any, ...], scale: float | jax.Array) -> Denoise:
    """Wraps a grouped denoiser into a guided one.

    Args:
      denoise: called once per evaluation, on all groups.
      conditions: (null, condition), or (condition,) for no guidance; passed through.
      scale: a number, f32[] or f32[B].
    """
    if len(conditions) == 1:
        return lambda x, sigma, until=None: denoise(x, sigma, conditions, until)

    def velocity(x: jax.Array, sigma: jax.Array, until: jax.Array | None = None) -> jax.Array:
        null, conditioned = jnp.split(denoise(jnp.concatenate([x, x]), sigma, conditions, until), 2)
        weight = jnp.asarray(scale, jnp.float32)
        return extrapolate(null, conditioned, weight.reshape(weight.shape + (1,) * (x.ndim - weight.ndim)))

    return velocity
