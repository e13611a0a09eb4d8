"""Flow-GRPO's stochastic step against its recordings and the flow it has to preserve."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.config import ScheduleConfig
from blip3o_jax.diffusion import sde
from blip3o_jax.diffusion.flow import inference_sigmas


@pytest.fixture(scope="module")
def recorded(golden_root):
    """Name of a step -> (its index, its recording)."""
    steps = {}
    with np.load(golden_root / "rl" / "rl.npz") as file:
        for key in file:
            if found := re.fullmatch(r"(sde_shift\d+_step(\d+))_(\w+)", key):
                steps.setdefault(found[1], (int(found[2]), {}))[1][found[3]] = file[key]
    assert steps
    return steps


def test_rows_may_stand_at_different_steps(recorded):
    (i, first), (j, second) = recorded["sde_shift3_step1"], recorded["sde_shift3_step8"]
    x, v = (np.stack([first[key][0], second[key][1]]) for key in ("x", "v"))
    got = sde.transition(x, v, np.array([i, j]), first["sigmas"])
    np.testing.assert_allclose(got.mean, np.stack([first["mean"][0], second["mean"][1]]), atol=1e-5)
    sample = np.stack([first["other"][0], second["other"][1]])
    expected = [first["logp_other"][0], second["logp_other"][1]]
    np.testing.assert_allclose(sde.log_prob(got, sample), expected, rtol=1e-5)


def test_without_noise_the_mean_is_the_euler_step():
    x, v = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    sigmas = inference_sigmas(ScheduleConfig(1.0), 10)
    np.testing.assert_allclose(sde.transition(x, v, 4, sigmas, noise_level=0.0).mean, x - 0.1 * v, atol=1e-6)


def test_stochastic_steps_keep_the_marginals_of_the_flow():
    sigmas = inference_sigmas(ScheduleConfig(1.0), 400)
    mean, stddev = 2.0, 0.5

    def step(i, x):
        sigma = jnp.asarray(sigmas)[i]
        variance = ((1 - sigma) * stddev) ** 2 + sigma**2
        data = mean + (1 - sigma) * stddev**2 / variance * (x - (1 - sigma) * mean)
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), i), x.shape)
        return sde.draw(sde.transition(x, (x - data) / sigma, i, sigmas), noise)

    x = jax.lax.fori_loop(0, 399, step, jax.random.normal(jax.random.key(0), (20_000, 1)))
    assert float(x.mean()) == pytest.approx(mean, abs=0.03)
    assert float(x.std()) == pytest.approx(stddev, abs=0.03)


def test_log_prob_is_that_of_a_gaussian_and_kl_vanishes_between_equal_steps():
    x, v, other = np.random.default_rng(0).normal(size=(3, 2, 4, 4)).astype(np.float32)
    sigmas = inference_sigmas(ScheduleConfig(1.0), 10)
    step, reference = sde.transition(x, v, 3, sigmas), sde.transition(x, v + 0.1, 3, sigmas)
    density = jax.scipy.stats.norm.logpdf(other, step.mean, step.std).mean((1, 2))
    np.testing.assert_allclose(sde.log_prob(step, other), density, rtol=1e-5)
    np.testing.assert_allclose(sde.kl_divergence(step, step), 0)
    expected = np.square(step.mean - reference.mean).mean((1, 2)) / (2 * step.diffusion**2)
    np.testing.assert_allclose(sde.kl_divergence(step, reference), expected, rtol=1e-5)
