"""Deterministic samplers of the flow dx/dsigma = velocity, from noise (sigma 1) to data (sigma 0).

A sampler is `step(denoise, state, i, sigmas) -> state`, from noise level sigmas[i] to sigmas[i + 1], where
`denoise(x, sigma) -> velocity`. What a multistep method remembers is in the state, so that a run may be cut at any
step, and `i` may be traced: one compiled program serves a single step, with a progress bar, and all of them.

Evaluations of the denoiser for S steps: euler S, heun 2 S - 1, dpmpp_2m S. docs/samplers.md compares them.
Source: the reference samples with diffusers `FlowMatchEulerDiscreteScheduler` (euler).
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

Denoise = Callable[[jax.Array, jax.Array], jax.Array]
"""(x f32[B ...], sigma f32[] in (0, 1]) -> velocity f32[B ...] = noise - data"""


@flax.struct.dataclass
class SamplerState:
    """Where a run stands."""

    x: jax.Array  # f32[B ...]
    previous: jax.Array  # f32[B ...], data as predicted at the step before; zeros at first
    previous_sigma: jax.Array  # f32[], noise level of that prediction; 1 at first: it counts for nothing


Step = Callable[[Denoise, SamplerState, jax.Array, jax.Array], SamplerState]


def initial_state(noise: jax.Array) -> SamplerState:
    """The state before the first step."""
    x = jnp.asarray(noise, jnp.float32)
    return SamplerState(x, jnp.zeros_like(x), jnp.float32(1))


def euler(denoise: Denoise, state: SamplerState, i: jax.Array, sigmas: jax.Array) -> SamplerState:
    """First order, one evaluation."""
    velocity = denoise(state.x, sigmas[i])
    return state.replace(x=state.x + (sigmas[i + 1] - sigmas[i]) * velocity)


def heun(denoise: Denoise, state: SamplerState, i: jax.Array, sigmas: jax.Array) -> SamplerState:
    """Second order, two evaluations; one in a step that ends at sigma 0, where the denoiser was never trained.

    Source: arXiv 2206.00364, algorithm 1.
    """
    step = sigmas[i + 1] - sigmas[i]
    velocity = denoise(state.x, sigmas[i])
    predicted = state.x + step * velocity

    def correct():
        return state.x + step * (velocity + denoise(predicted, sigmas[i + 1])) / 2

    return state.replace(x=jax.lax.cond(sigmas[i + 1] > 0, correct, lambda: predicted))


def dpmpp_2m(denoise: Denoise, state: SamplerState, i: jax.Array, sigmas: jax.Array) -> SamplerState:
    """Second-order multistep, one evaluation: the predicted data is extrapolated in log((1 - sigma) / sigma).

    First order where that is infinite: at sigma 1, in the step after it and in a step to sigma 0.
    Source: arXiv 2211.01095, algorithm 2, with alpha = 1 - sigma.
    """
    sigma, after, before = sigmas[i], sigmas[i + 1], state.previous_sigma
    data = state.x - sigma * denoise(state.x, sigma)
    second_order = (before < 1) & (after > 0)
    ratio = jnp.where(second_order, _log_snr(after, sigma) / _log_snr(sigma, before), 0)
    extrapolated = data + ratio / 2 * (data - state.previous)
    x = after / sigma * state.x + (1 - after / sigma) * extrapolated
    return SamplerState(x, data, sigma)


def _log_snr(sigma: jax.Array, reference: jax.Array) -> jax.Array:
    """log((1 - sigma) / sigma) above that of the noisier `reference`; finite, if meaningless, at 0 and 1."""
    sigma, reference = (jnp.clip(level, 1e-6, 1 - 1e-6) for level in (sigma, reference))
    return jnp.log((1 - sigma) / sigma) - jnp.log((1 - reference) / reference)


SAMPLERS: dict[str, Step] = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


def evaluations(sampler: str, steps: int) -> int:
    """How often `steps` steps down to sigma 0 call the denoiser."""
    return 2 * steps - 1 if sampler == "heun" else steps


def advance(
    denoise: Denoise, state: SamplerState, sigmas: jax.Array, sampler: str, start: jax.Array, stop: jax.Array
) -> SamplerState:
    """Takes the steps start, ..., stop - 1; both i32[], traced or not.

    Args:
      sigmas: f32[S + 1], falling.
      sampler: a name of SAMPLERS.
    """
    sigmas = jnp.asarray(sigmas, jnp.float32)
    step = SAMPLERS[sampler]
    return jax.lax.fori_loop(start, stop, lambda i, state: step(denoise, state, i, sigmas), state)


def sample(
    denoise: Denoise,
    noise: jax.Array,
    sigmas: jax.Array,
    sampler: str = "euler",
    start: jax.Array | int = 0,
    stop: jax.Array | int | None = None,
) -> jax.Array:
    """Runs a sampler from `noise` f32[B ...] at sigmas[start] to sigmas[stop] (default: all); returns f32[B ...]."""
    stop = len(sigmas) - 1 if stop is None else stop
    return advance(denoise, initial_state(noise), sigmas, sampler, start, stop).x
