"""Samplers of the flow dx/dsigma = velocity, from noise (sigma 1) to data (sigma 0).

A sampler is three functions, similar to an optax transformation. Its state is a tree of arrays with static shapes, so a
run can stop after any step, and the step index may be traced: one compiled program serves any range of steps. B images;
their keys are for samplers that add noise.

A sampler from another package is named `package.module:attribute`; examples/sampler.py is an example.

Denoiser evaluations for S steps: euler S, heun 2 S - 1, dpmpp_2m S. docs/samplers.md compares them.
Source: the reference samples with diffusers `FlowMatchEulerDiscreteScheduler` (euler).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.config import registry
from blip3o_jax.errors import call_custom, require, type_of

Denoise = Callable[..., jax.Array]
"""(x f32[B ...], sigma f32[] in (0, 1], until f32[] = None) -> velocity f32[B ...] = noise - data at sigma. Models that
were distilled to few steps return the mean velocity from sigma to `until` if it is given."""


class Sampler(NamedTuple):
    """An integrator of the flow.

    Attributes:
      init: (noise f32[B ...], keys key[B]) -> state before the first step.
      step: (denoise, x f32[B ...], state, i i32[], sigmas f32[S + 1]) -> (x, state): from sigmas[i] to sigmas[i + 1].
      evaluations: S -> number of denoiser calls in S steps down to sigma 0.
    """

    init: Callable[[jax.Array, jax.Array], Any]
    step: Callable[[Denoise, jax.Array, Any, jax.Array, jax.Array], tuple[jax.Array, Any]]
    evaluations: Callable[[int], int] = lambda steps: steps


def _stateless(noise: jax.Array, keys: jax.Array) -> tuple[()]:
    del noise, keys
    return ()


def euler() -> Sampler:
    """Returns the first-order sampler, one evaluation per step; exact for mean velocities."""

    def step(denoise, x, state, i, sigmas):
        return x + (sigmas[i + 1] - sigmas[i]) * denoise(x, sigmas[i], sigmas[i + 1]), state

    return Sampler(_stateless, step)


def heun() -> Sampler:
    """Returns the second-order Heun sampler, two evaluations per step, one in a step to sigma 0.

    Sigma 0 is skipped because the denoiser was not trained there. Source: arXiv 2206.00364, algorithm 1.
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
    """Returns the second-order multistep sampler, one evaluation per step.

    It extrapolates the predicted data in log((1 - sigma) / sigma), and is first order where that is infinite: at sigma
    1, in the step after it, and in a step to sigma 0. The state is the data predicted at the previous step, with the
    noise level there. Source: arXiv 2211.01095, algorithm 2, with alpha = 1 - sigma.
    """

    def init(noise, keys):
        del keys
        return jnp.zeros_like(noise), jnp.float32(1)

    def step(denoise, x, state, i, sigmas):
        (previous, before), sigma, after = state, sigmas[i], sigmas[i + 1]
        data = x - sigma * denoise(x, sigma)
        second_order = (before < 1) & (after > 0)
        old, now, new = (jnp.log((1 - level) / level) for level in (before, sigma, after))
        ratio = jnp.where(second_order, (new - now) / (now - old), 0)
        extrapolated = data + ratio / 2 * (data - previous)
        return after / sigma * x + (1 - after / sigma) * extrapolated, (data, sigma)

    return Sampler(init, step)


SAMPLERS: dict[str, Callable[[], Sampler]] = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m}


def find(name: str) -> Sampler:
    """Returns the sampler of a name: a key of `SAMPLERS`, or `package.module:attribute` of a function that returns one.

    Raises:
      UserError: an unknown name, or a function that raises or returns something else; when it is called, a function of
        the sampler that does.
    """
    made = registry.make(SAMPLERS, name, "sampler")
    good = isinstance(made, Sampler) and all(map(callable, made))
    require(good, f"sampler {name}", type_of(made), "a function that returns Sampler, a tuple of functions")
    return made if name in SAMPLERS else _checked(made, f"sampler {name}")


def _checked(sampler: Sampler, what: str) -> Sampler:
    """Returns a sampler that raises UserError if `init` or `step` raises, or returns something else than it should."""

    def init(noise: jax.Array, keys: jax.Array) -> Any:
        state = call_custom(f"{what}: init", sampler.init, noise, keys)
        wrong = [leaf for leaf in jax.tree.leaves(state) if not isinstance(leaf, int | float | np.ndarray | jax.Array)]
        require(not wrong, f"{what}: init", ", ".join(map(type_of, wrong)), "a tree of arrays", "correct it")
        return state

    def step(denoise: Denoise, x: jax.Array, state: Any, i: jax.Array, sigmas: jax.Array) -> tuple[jax.Array, Any]:
        made = call_custom(f"{what}: step", sampler.step, denoise, x, state, i, sigmas)
        good = isinstance(made, tuple) and len(made) == 2
        require(good, f"{what}: step", type_of(made), "a tuple of 2: x and the state", "correct it")
        for name, after, before in zip(("x", "state"), made, (x, state), strict=True):
            got, expected = jax.tree.map(type_of, after), jax.tree.map(type_of, before)
            require(got == expected, f"{what}: {name} after a step", got, f"{expected}, as before it", "correct it")
        return made

    return sampler._replace(init=init, step=step)


def advance(
    sampler: Sampler,
    denoise: Denoise,
    x: jax.Array,
    state: Any,
    sigmas: jax.Array,
    start: jax.Array | int,
    stop: jax.Array | int,
) -> tuple[jax.Array, Any]:
    """Takes the steps start, ..., stop - 1.

    Args:
      sampler: the integrator.
      denoise: predicts velocities.
      x: f32[B ...] at sigmas[start].
      state: state of the sampler there.
      sigmas: f32[S + 1], in falling order.
      start, stop: i32[], may be traced.

    Returns:
      f32[B ...] at sigmas[stop], and the state there.
    """
    sigmas = jnp.asarray(sigmas, jnp.float32)

    def body(i, carry):
        return sampler.step(denoise, *carry, i, sigmas)

    return jax.lax.fori_loop(start, stop, body, (x, state))
