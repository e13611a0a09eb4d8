"""Classifier-free guidance around a denoiser that runs several conditions as groups of one batch.

Source: arXiv 2207.12598. B batch, G groups.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from blip3o_jax.diffusion.samplers import Denoise

GroupedDenoise = Callable[[jax.Array, jax.Array, tuple[Any, ...]], jax.Array]
"""(x f32[G*B ...], sigma f32[], one condition per group) -> velocity f32[G*B ...]"""


def guided(denoise: GroupedDenoise, condition: Any, null_condition: Any, scale: float | jax.Array) -> Denoise:
    """A denoiser that extrapolates from the null condition: v_null + scale * (v_condition - v_null).

    Args:
      denoise: called once per evaluation, on the null group followed by the conditioned one.
      condition, null_condition: passed through.
      scale: a number, f32[] or f32[B]. The number 1 runs the conditioned group alone; an array runs both groups
        whatever its value.
    """
    if isinstance(scale, (int, float)) and scale == 1:
        return lambda x, sigma: denoise(x, sigma, (condition,))

    def velocity(x: jax.Array, sigma: jax.Array) -> jax.Array:
        both = denoise(jnp.concatenate([x, x]), sigma, (null_condition, condition))
        null, conditioned = jnp.split(both, 2)
        weight = jnp.asarray(scale, jnp.float32)
        weight = weight.reshape(weight.shape + (1,) * (x.ndim - weight.ndim)) if weight.ndim else weight
        return null + weight * (conditioned - null)

    return velocity
