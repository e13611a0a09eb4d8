"""Samplers on flows whose exact velocity is known, and guidance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.config import ScheduleConfig
from blip3o_jax.diffusion import samplers
from blip3o_jax.diffusion.flow import inference_sigmas
from blip3o_jax.diffusion.guidance import extrapolate, guided
from blip3o_jax.diffusion.samplers import SAMPLERS, advance

KEYS = jax.random.split(jax.random.key(0), 500)
NOISE = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float32)
MEANS = np.random.default_rng(1).normal(size=(6, 8)).astype(np.float32)


def mixture_velocity(x, sigma, stddev=0.15):
    """Exact velocity of data from a mixture of Gaussians around MEANS."""
    variance = ((1 - sigma) * stddev) ** 2 + sigma**2
    offsets = x[:, None] - (1 - sigma) * MEANS
    weights = jax.nn.softmax(-jnp.square(offsets).sum(-1) / (2 * variance), axis=-1)
    data = MEANS + (1 - sigma) * stddev**2 / variance * offsets
    return (x - (weights[..., None] * data).sum(1)) / sigma


def gaussian_velocity(x, sigma, mean=2.0, stddev=0.5):
    variance = ((1 - sigma) * stddev) ** 2 + sigma**2
    data = mean + (1 - sigma) * stddev**2 / variance * (x - (1 - sigma) * mean)
    return (x - data) / sigma


@functools.partial(jax.jit, static_argnames=("velocity", "sampler"))
def run(velocity, sigmas, sampler):
    return sample(velocity, NOISE, sigmas, sampler)


def sample(velocity, noise, sigmas, sampler="euler", start=0, stop=None):
    """The whole run of a sampler, or a part of it."""
    own, stop = samplers.find(sampler), len(sigmas) - 1 if stop is None else stop
    return advance(own, at_a_level(velocity), noise, own.init(noise, KEYS), sigmas, start, stop)[0]


def at_a_level(velocity):
    """A denoiser that has no mean velocities."""
    return lambda x, sigma, until=None: velocity(x, sigma)


def evaluations(sampler, steps):
    return samplers.find(sampler).evaluations(steps)


@functools.cache
def mixture_solution():
    return run(mixture_velocity, inference_sigmas(ScheduleConfig(1.0), 1000), "heun")


@functools.cache
def mixture_error(sampler: str, count: int, shift: float) -> float:
    """Root mean square distance to the exact flow for a number of evaluations."""
    steps = next(steps for steps in range(1, 60) if evaluations(sampler, steps) == count)
    got = run(mixture_velocity, inference_sigmas(ScheduleConfig(shift), steps), sampler)
    return float(jnp.sqrt(jnp.square(got - mixture_solution()).mean()))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("count", [4, 6, 8])
def test_dpmpp_2m_is_nearer_than_euler_at_few_evaluations(count, shift):
    assert mixture_error("dpmpp_2m", count, shift) < 0.99 * mixture_error("euler", count, shift)


@pytest.mark.parametrize(("count", "shift"), [(5, 1.0), (7, 1.0), (7, 3.0)])
def test_heun_is_nearer_than_euler_at_equal_evaluations(count, shift):
    assert mixture_error("heun", count, shift) < 0.95 * mixture_error("euler", count, shift)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_error_falls_with_the_order_of_the_method(sampler, order):
    def error(steps):
        sigmas = np.linspace(0.9, 0.1, steps + 1).astype(np.float32)
        exact = 2.0 * 0.9 + NOISE * np.sqrt((0.1 * 0.1) + (0.9 * 0.5) ** 2)
        start = 2.0 * 0.1 + NOISE * np.sqrt((0.9 * 0.9) + (0.1 * 0.5) ** 2)
        return float(np.abs(sample(gaussian_velocity, start, sigmas, sampler) - exact).max())

    assert np.log2(error(32) / error(64)) == pytest.approx(order, abs=0.35)


def test_dpmpp_2m_extrapolates_the_data_in_the_log_of_the_signal_to_noise_ratio():
    levels, (first, second) = np.array([0.9, 0.8, 0.3]), (1.0, 2.0)

    def velocity(x, sigma):
        return (x - jnp.where(sigma > 0.85, first, second)) / sigma  # these are the predicted data

    log_snr = np.log((1 - levels) / levels)
    ahead = (log_snr[2] - log_snr[1]) / (log_snr[1] - log_snr[0]) / 2
    x = 8 / 9 * NOISE + 1 / 9 * first
    x = 3 / 8 * x + 5 / 8 * (second + ahead * (second - first))
    np.testing.assert_allclose(sample(velocity, NOISE, levels, "dpmpp_2m"), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_straight_flow_arrives_exactly(sampler):
    target = np.float32(1.5)
    got = sample(
        lambda x, sigma, until=None: (x - target) / sigma, NOISE, inference_sigmas(ScheduleConfig(3.0), 4), sampler
    )
    np.testing.assert_allclose(got, np.full_like(NOISE, target), atol=2e-6)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_euler_is_exact_for_mean_velocities_in_any_number_of_steps(steps):
    def moved(x, sigma, until):
        """Along the flow to Gaussian data of mean 2 and deviation 0.5."""
        wide = lambda level: jnp.sqrt(level**2 + ((1 - level) * 0.5) ** 2)  # noqa: E731
        return 2.0 * (1 - until) + (x - 2.0 * (1 - sigma)) * wide(until) / wide(sigma)

    def mean_velocity(x, sigma, until):
        return (moved(x, sigma, until) - x) / (until - sigma)

    sigmas = inference_sigmas(ScheduleConfig(3.0), steps)
    got, _ = advance(samplers.find("euler"), mean_velocity, NOISE, (), sigmas, 0, steps)
    np.testing.assert_allclose(got, 2.0 + 0.5 * NOISE, atol=5e-6)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_program_takes_single_steps_and_all_of_them(sampler):
    sigmas = inference_sigmas(ScheduleConfig(1.0), 6)
    traces = []

    @jax.jit
    def program(x, state, start, stop):
        traces.append(stop)
        return advance(own, at_a_level(mixture_velocity), x, state, sigmas, start, stop)

    own = samplers.find(sampler)
    carry = first = NOISE, own.init(NOISE, KEYS)
    for i in range(6):
        carry = program(*carry, i, i + 1)
    np.testing.assert_allclose(carry[0], program(*first, 0, 6)[0], atol=1e-6)
    assert len(traces) == 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_evaluations_are_counted_honestly(sampler):
    calls = []

    def velocity(x, sigma):
        jax.debug.callback(lambda level: calls.append(float(level)), sigma)
        return mixture_velocity(x, sigma)

    sample(velocity, NOISE, inference_sigmas(ScheduleConfig(1.0), 5), sampler).block_until_ready()
    jax.effects_barrier()
    assert len(calls) == evaluations(sampler, 5)
    assert min(calls) > 0


def test_a_run_may_start_and_stop_between():
    sigmas = inference_sigmas(ScheduleConfig(1.0), 6)
    middle = sample(mixture_velocity, NOISE, sigmas, stop=2)
    np.testing.assert_allclose(
        sample(mixture_velocity, middle, sigmas, start=2), sample(mixture_velocity, NOISE, sigmas), atol=1e-6
    )


def grouped(x, sigma, conditions, until=None):
    parts = jnp.split(x, len(conditions))
    return jnp.concatenate([part * condition for part, condition in zip(parts, conditions, strict=True)])


def test_guidance_extrapolates_from_the_null_condition():
    sigma = jnp.float32(0.5)
    np.testing.assert_allclose(guided(grouped, (1.0, 3.0), 2.0)(NOISE, sigma), 5 * NOISE, rtol=1e-6)
    scales = jnp.arange(500.0)
    np.testing.assert_allclose(
        guided(grouped, (1.0, 3.0), scales)(NOISE, sigma), NOISE * (1 + 2 * scales[:, None]), rtol=1e-6
    )
    np.testing.assert_array_equal(extrapolate(1e6 * NOISE, NOISE, 1.0), NOISE)  # without rounding


def test_guidance_of_one_runs_the_conditioned_group_alone_and_passes_the_end_of_the_step_on():
    seen = []

    def denoise(x, sigma, conditions, until):
        seen.append((len(x), conditions, until))
        return grouped(x, sigma, conditions)

    np.testing.assert_allclose(guided(denoise, (3.0,), 1.0)(NOISE, jnp.float32(0.5), 0.25), 3 * NOISE)
    guided(denoise, (1.0, 3.0), 2.0)(NOISE, jnp.float32(0.5), 0.25)
    assert seen == [(500, (3.0,), 0.25), (1000, (1.0, 3.0), 0.25)]
