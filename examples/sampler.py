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


def ancestral(eta: float = 1.0) -> Sampler:
    """Draws part of the noise anew at every step, of each image's own key; eta 0 is Euler, 1 the reverse diffusion.

    Source: DDIM (arXiv 2010.02502), equation 16, for data and noise in the shares 1 - sigma and sigma.
    """

    def step(denoise, x, keys, i, sigmas):
        sigma, after = sigmas[i], sigmas[i + 1]
        velocity = denoise(x, sigma)
        data, noise = x - sigma * velocity, x + (1 - sigma) * velocity
        kept = (1 - sigma) / (1 - after) * after / sigma  # correlation of the noise before and after
        fresh = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), x.shape[1:]))(keys)
        share = eta * jnp.sqrt(1 - kept**2)
        noise = jnp.sqrt(1 - share**2) * noise + share * fresh
        return (1 - after) * data + after * noise, keys

    return Sampler(lambda noise, keys: keys, step)


half_ancestral = functools.partial(ancestral, eta=0.5)
