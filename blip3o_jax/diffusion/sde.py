"""The stochastic sampler of Flow-GRPO: noisy Euler steps that preserve the flow's marginals, and their densities.

B batch, S steps. Everything is float32.

Source: arXiv 2505.05470, equation 9, and its implementation: the noise coefficient at sigma 1 uses the schedule's
second level, so that it is finite; log-densities and KL are means over elements, not sums.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp

NOISE_LEVEL = 0.7  # as published


@flax.struct.dataclass
class Transition:
    """The Gaussian transition of one step."""

    mean: jax.Array  # f32[B ...]
    diffusion: jax.Array  # f32[] or f32[B 1 ...], coefficient of the noise
    std: jax.Array  # same shape, diffusion * sqrt(sigma - next sigma)


def transition(
    x: jax.Array, velocity: jax.Array, i: jax.Array, sigmas: jax.Array, noise_level: float = NOISE_LEVEL
) -> Transition:
    """Returns the distribution of the latents after step i.

    Args:
      x: f32[B ...] at noise level sigmas[i].
      velocity: f32[B ...] there.
      i: i32[] or i32[B], step of every row, 0 to S - 1.
      sigmas: f32[S + 1], falling from 1 to 0.
      noise_level: 0 gives the deterministic Euler step, which has no density.
    """
    sigmas, i = jnp.asarray(sigmas, jnp.float32), jnp.asarray(i)
    rows = i.shape + (1,) * (x.ndim - 1) if i.ndim else ()
    sigma, after = (sigmas[index].reshape(rows) for index in (i, i + 1))
    step = after - sigma
    diffusion = noise_level * jnp.sqrt(sigma / (1 - jnp.where(sigma == 1, sigmas[1], sigma)))
    drift = diffusion**2 / (2 * sigma)
    mean = x * (1 + drift * step) + velocity * (1 + drift * (1 - sigma)) * step
    return Transition(mean, diffusion, diffusion * jnp.sqrt(-step))


def draw(step: Transition, noise: jax.Array) -> jax.Array:
    """Returns the latents f32[B ...] after the step, for standard normal noise f32[B ...]."""
    return step.mean + step.std * noise


def log_prob(step: Transition, sample: jax.Array) -> jax.Array:
    """Returns the log-density f32[B] of `sample` f32[B ...], averaged over elements."""
    density = -jnp.square((sample - step.mean) / step.std) / 2 - jnp.log(step.std) - math.log(2 * math.pi) / 2
    return _row_means(density)


def kl_divergence(step: Transition, reference: Transition) -> jax.Array:
    """Returns Flow-GRPO's KL f32[B] of two steps with different means: averaged over elements, in `diffusion` units."""
    return _row_means(jnp.square(step.mean - reference.mean) / (2 * jnp.square(step.diffusion)))


def _row_means(x: jax.Array) -> jax.Array:
    return x.mean(axis=tuple(range(1, x.ndim)))
