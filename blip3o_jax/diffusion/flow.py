"""Flow matching: the straight path between data and noise, its velocity, and the noise schedules.

Convention: sigma 0 = data, 1 = noise; x_t = (1 - sigma) data + sigma noise; velocity = noise - data;
timestep t = 1000 sigma. Everything is float32. B batch, N training levels, S sampling steps.

Source: arXiv 2210.02747, 2403.03206; diffusers `FlowMatchEulerDiscreteScheduler`.
Differs from the reference:
1. Schedules are pure functions, so sampling cannot change the one used in training.
2. Noise levels are looked up by index, not by comparing floats, and are not rounded to the latent's dtype.
"""

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.config import ScheduleConfig
from blip3o_jax.errors import require


def shift_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Shifts noise levels s to shift s / (1 + (shift - 1) s), in float32: towards noise if shift > 1."""
    sigmas = sigmas.astype(np.float32)
    return (np.float32(shift) * sigmas / (1 + np.float32(shift - 1) * sigmas)).astype(np.float32)


def train_sigmas(schedule: ScheduleConfig) -> np.ndarray:
    """Returns the noise levels float32[N] of training, in falling order."""
    count = schedule.num_train_timesteps
    return shift_sigmas(np.arange(count, 0, -1, dtype=np.float32) / np.float32(count), schedule.shift)


def inference_sigmas(schedule: ScheduleConfig, steps: int) -> np.ndarray:
    """Returns the noise levels float32[S + 1] of sampling: 1, ..., 1 / S before the shift, and a final 0.

    Args:
      schedule: the shift.
      steps: S, at least 1.

    Raises:
      UserError: fewer than one step.
    """
    require(steps >= 1, "num_inference_steps", steps, "1 or more", "raise it")
    return np.append(shift_sigmas(np.linspace(1.0, 1 / steps, steps), schedule.shift), np.float32(0))


def timestep_index(u: jax.Array, schedule: ScheduleConfig) -> jax.Array:
    """Returns the index i32[B] into `train_sigmas` for uniform draws u: f32[B] in [0, 1)."""
    return jnp.floor(u * schedule.num_train_timesteps).astype(jnp.int32)


def spread_levels(key: jax.Array, count: int) -> jax.Array:
    """Draws f32[count] in [0, 1), uniform and equally spaced modulo 1."""
    return (jax.random.uniform(key) + jnp.arange(count) / count) % 1


def interpolate(data: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """Returns the point f32[B ...] of the path between f32[B ...] at noise level sigma: f32[B]."""
    sigma = sigma.reshape(-1, *(1,) * (data.ndim - 1))
    return (1 - sigma) * data + sigma * noise


def noisy_example(
    schedule: ScheduleConfig, data: jax.Array, noise: jax.Array, u: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Makes one training example per row.

    Args:
      schedule: noise levels.
      data, noise: f32[B ...].
      u: f32[B] in [0, 1), selects the noise level.

    Returns:
      The noisy data f32[B ...], its noise level f32[B], and the velocity f32[B ...] of the path, the target.
    """
    sigma = jnp.asarray(train_sigmas(schedule))[timestep_index(u, schedule)]
    return interpolate(data, noise, sigma), sigma, noise - data
