"""Samplers of the flow dx/dsigma = velocity, from noise (sigma 1) to data (sigma 0).

A sampler is three functions, as an optax transformation is two. Its state is any tree of arrays with static shapes, so
that a run may be cut at any step, and the step may be traced: one compiled program serves a single step and all of
them. B images; their keys are for samplers that add noise.

A sampler of another package is named `package.module:attribute`; examples/sampler.py is one.

Evaluations of the denoiser for S steps: euler S, heun 2 S - 1, dpmpp_2m S. docs/samplers.md compares them.
Source: the reference samples with diffusers `FlowMatchEulerDiscreteScheduler` (euler).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from blip3o_jax.config import registry
from blip3o_jax.errors import require, type_of

Denoise = Callable[..., jax.Array]
"""(x f32[B ...], sigma f32[] in (0, 1], until f32[] = None) -> velocity f32[B ...] = noise - data at sigma. Of a model
that was distilled to few steps it is the mean velocity from sigma to `until`, where that is given."""


class Sampler(NamedTuple):
    """How a flow is followed.

    Attributes:
      init: (noise f32[B ...], keys key[B]) -> state before the first step.
      step: (denoise, x f32[B ...], state, i i32[], sigmas f32[S + 1]) -> (x, state): from sigmas[i] to sigmas[i + 1].
      evaluations: S -> how often S steps down to sigma 0 call the denoiser.
    """

    init: Callable[[jax.Array, jax.Array], Any]
    step: Callable[[Denoise, jax.Array, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]
    evaluations: Callable[[int], int] = lambda steps: steps


def _stateless(noise: jax.Array, keys: jax.Array) -> tuple[()]:
    del noise, keys
    return ()


def euler() -> Sampler:
    """First order, one evaluation; exact for a mean velocity."""

    def step(denoise, x, state, i, sigmas):
        return x + (sigmas[i + 1] - sigmas[i]) * denoise(x, sigmas[i], sigmas[i + 1]), state

    return Sampler(_stateless, step)


def heun() -> Sampler:
    """Second order, two evaluations; one in a step that ends at sigma 0, where the denoiser was never trained.

    Source: arXiv 2206.00364, algorithm 1.
    """

    def step(denoise, x, state, i, sigmas):
        width = sigmas[i + 1] - sigmas[i]
        velocity = denoise(x, sigmas[i])
        predicted = x + width * velocity

        def correct():
            return x + width * (velocity + denoise(predicted, sigmas[i + 1])) / 2

        return jax.lax.cond(sigmas[i + 1] > 0, correct, lambda: predicted), state

    return Sampler(_stateless, step, lambda steps: 2 * steps - 1)


def dpmpp_2m() -> Sampler:
    """Second-order multistep, one evaluation: the predicted data is extrapolated in log((1 - sigma) / sigma).

    First order where that is infinite: at sigma 1, in the step after it and in a step to sigma 0. The state is the data
    as predicted at the step before, and the noise level there; a level of 1 counts for nothing.
    Source: arXiv 2211.01095, algorithm 2, with alpha = 1 - sigma.
    """

    def init(noise, keys):
        del keys
        return jnp.zeros_like(noise), jnp.float32(1)

    def step(denoise, x, state, i, sigmas):
        (previous, before), sigma, after = state, sigmas[i], sigmas[i + 1]
        data = x - sigma * denoise(x, sigma)
        second_order = (before < 1) & (after > 0)
        ratio = jnp.where(second_order, _log_snr(after, sigma) / _log_snr(sigma, before), 0)
        extrapolated = data + ratio / 2 * (data - previous)
        return after / sigma * x + (1 - after / sigma) * extrapolated, (data, sigma)

    return Sampler(init, step)


def _log_snr(sigma: jax.Array, reference: jax.Array) -> jax.Array:
    """log((1 - sigma) / sigma) above that of the noisier `reference`; finite, if meaningless, at 0 and 1."""
    sigma, reference = (jnp.clip(level, 1e-6, 1 - 1e-6) for level in (sigma, reference))
    return jnp.log((1 - sigma) / sigma) - jnp.log((1 - reference) / reference)


SAMPLERS: dict[str, Callable[[], Sampler]] = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


def find(name: str) -> Sampler:
    """The sampler of a name: a key of `SAMPLERS`, or `package.module:attribute`, a function that makes one.

    Raises:
      UserError: an unknown name, or something that makes no sampler.
    """
    made = registry.make(SAMPLERS, name, "sampler")
    require(isinstance(made, Sampler), f"sampler {name}", type_of(made), "a function that returns Sampler")
    return made


def advance(
    sampler: Sampler,
    denoise: Denoise,
    x: jax.Array,
    state: Any,
    sigmas: jax.Array,
    start: jax.Array | int,
    stop: jax.Array | int,
) -> tuple[jax.Array, Any]:
    """Takes the steps start, ..., stop - 1; both i32[], traced or not.

    Args:
      x: f32[B ...] at sigmas[start].
      state: of the sampler there.
      sigmas: f32[S + 1], falling.
    """
    sigmas = jnp.asarray(sigmas, jnp.float32)

    def body(i, carry):
        return sampler.step(denoise, *carry, i, sigmas)

    return jax.lax.fori_loop(start, stop, body, (x, state))
