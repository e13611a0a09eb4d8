"""Samplers from outside the package: one that remembers a velocity, one that draws noise.

    cd examples
    python ../sample.py --prompt "a red circle" --sampler sampler:adams_bashforth

`--config.rl.render.sampler=sampler:ancestral` names one for rollouts. A sampler is a function that returns
`blip3o_jax.diffusion.samplers.Sampler(init, step, evaluations)`; its state is any tree of arrays.
"""

import functools

import jax
import jax.numpy as jnp

from blip3o_jax.diffusion.samplers import Sampler


def adams_bashforth() -> Sampler:
    """Second order with one evaluation a step: the velocity is extrapolated from the step before."""

    def init(noise, keys):
        del keys
        return jnp.zeros_like(noise), jnp.float32(0)  # velocity and width of the step before; none at first

    def step(denoise, x, state, i, sigmas):
        (previous, before), width = state, sigmas[i + 1] - sigmas[i]
        velocity = denoise(x, sigmas[i])
        ratio = jnp.where(before < 0, width / jnp.where(before < 0, before, 1), 0)
        return x + width * (velocity + ratio / 2 * (velocity - previous)), (velocity, width)

    return Sampler(init, step)


def ancestral(fresh_share: float = 0.5) -> Sampler:
    """Replaces a share of the noise that is left by fresh noise at every step, of each image's own key."""

    def step(denoise, x, keys, i, sigmas):
        velocity = denoise(x, sigmas[i])
        data, noise = x - sigmas[i] * velocity, x + (1 - sigmas[i]) * velocity
        fresh = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), x.shape[1:]))(keys)
        noise = jnp.sqrt(1 - fresh_share**2) * noise + fresh_share * fresh
        return (1 - sigmas[i + 1]) * data + sigmas[i + 1] * noise, keys

    return Sampler(lambda noise, keys: keys, step)


very_random = functools.partial(ancestral, fresh_share=1.0)
