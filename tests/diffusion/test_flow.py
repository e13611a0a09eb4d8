"""Schedule tables, the straight path and the training example."""

import jax
import numpy as np
import pytest

from blip3o_jax.config import ScheduleConfig
from blip3o_jax.diffusion import flow
from blip3o_jax.errors import UserError

PLAIN, SHIFTED = ScheduleConfig(1.0), ScheduleConfig(3.0)


def test_training_levels_fall_from_one_to_a_thousandth():
    sigmas = flow.train_sigmas(PLAIN)
    assert sigmas.dtype == np.float32
    np.testing.assert_allclose(sigmas, np.arange(1000, 0, -1) / 1000, atol=1e-7)


def test_spread_levels_are_equally_spaced_around_a_circle():
    drawn = [np.sort(flow.spread_levels(jax.random.key(seed), 8)) for seed in range(20)]
    for levels in drawn:
        assert 0 <= levels[0] and levels[-1] < 1
        np.testing.assert_allclose(np.diff([*levels, levels[0] + 1]), 1 / 8, atol=1e-6)
    assert len({float(levels[0]) for levels in drawn}) == 20


def test_shift_keeps_the_ends_and_moves_the_middle_towards_noise():
    plain, shifted = flow.inference_sigmas(PLAIN, 10), flow.inference_sigmas(SHIFTED, 10)
    assert shifted[0] == plain[0] == 1 and shifted[-1] == plain[-1] == 0
    np.testing.assert_allclose(shifted[5], 3 * 0.5 / 2, atol=1e-6)
    assert np.all(shifted[1:-1] > plain[1:-1])


def test_inference_levels_are_uniform_without_shift():
    np.testing.assert_allclose(flow.inference_sigmas(PLAIN, 30), np.arange(30, -1, -1) / 30, atol=1e-7)
    assert flow.inference_sigmas(PLAIN, 1).tolist() == [1, 0]


def test_no_steps_is_a_user_error():
    with pytest.raises(UserError, match="num_inference_steps: got 0"):
        flow.inference_sigmas(PLAIN, 0)


def test_uniform_draws_index_the_table_and_never_leave_it():
    u = np.array([0, 0.0009999, 0.15, 0.99999994], np.float32)
    assert flow.timestep_index(u, PLAIN).tolist() == [0, 0, 150, 999]
    assert flow.timestep_index(u, ScheduleConfig(1.0, 1024)).tolist() == [0, 1, 153, 1023]


def test_path_ends_in_data_and_noise_with_constant_velocity():
    data, noise = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 4)).astype(np.float32)
    ends = [flow.interpolate(data, noise, np.full(3, sigma, np.float32)) for sigma in (0.0, 0.25, 1.0)]
    np.testing.assert_allclose(ends[0], data)
    np.testing.assert_allclose(ends[2], noise)
    np.testing.assert_allclose((ends[2] - ends[1]) / 0.75, noise - data, atol=1e-6)


def test_training_example_has_one_noise_level():
    data, noise = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    x, sigma, target = flow.noisy_example(SHIFTED, data, noise, np.array([0.0, 0.15, 0.999], np.float32))
    level = np.asarray(sigma)[:, None]
    np.testing.assert_allclose(x, (1 - level) * data + level * noise, atol=1e-6)
    plain = 1 - np.array([0, 0.15, 0.999])
    np.testing.assert_allclose(sigma, 3 * plain / (1 + 2 * plain), rtol=1e-5)
    np.testing.assert_allclose(target, noise - data)
