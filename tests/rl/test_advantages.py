"""Advantages: their definitions, and groups with equal rewards."""

import numpy as np
import pytest

from blip3o_jax.rl.advantages import ADVANTAGES, form_advantages

REWARDS = np.random.default_rng(0).normal(size=24).astype(np.float32)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_of_a_group_sum_to_zero(name):
    values, equal = form_advantages(name, REWARDS, 6)
    assert values.dtype == np.float32 and not equal.any()
    np.testing.assert_allclose(values.reshape(4, 6).sum(1), 0, atol=1e-5)


def test_grpo_is_in_units_of_the_groups_own_deviation_and_global_in_those_of_all():
    groups = REWARDS.reshape(4, 6).astype(np.float64)
    centred = groups - groups.mean(1, keepdims=True)
    own = centred / (np.sqrt((centred**2).sum(1, keepdims=True) / 5) + 1e-4)
    np.testing.assert_allclose(form_advantages("grpo", REWARDS, 6)[0], own.ravel(), rtol=1e-5)
    everything = centred / (groups.std() + 1e-4)
    np.testing.assert_allclose(form_advantages("grpo_global", REWARDS, 6)[0], everything.ravel(), rtol=1e-5)


def test_rloo_subtracts_the_mean_of_the_others():
    got = form_advantages("rloo", REWARDS, 6)[0].reshape(4, 6)
    groups = REWARDS.reshape(4, 6)
    expected = [[group[i] - np.delete(group, i).mean() for i in range(6)] for group in groups]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_group_of_equal_rewards_has_no_advantage_and_is_marked(name):
    levels = np.random.default_rng(1).random(50, np.float32)  # the mean of seven equal ones may round to another
    differing = np.resize(np.array([0.1, np.nextafter(np.float32(0.1), 1)]), 7)
    values, equal = form_advantages(name, np.append(np.repeat(levels, 7), differing.astype(np.float32)), 7)
    assert equal.tolist() == [True] * 350 + [False] * 7
    assert (values[:350] == 0).all() and (values[350:] != 0).all()
