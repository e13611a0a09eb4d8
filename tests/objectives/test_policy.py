"""The clipped policy loss: plain policy gradient where nothing is clipped, nothing earned beyond the clip, masks."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax import masked
from blip3o_jax.generate import scoring
from blip3o_jax.objectives import grpo
from blip3o_jax.objectives.policy import clipped_policy, reduce_tokens

RNG = np.random.default_rng(0)
OLD = RNG.normal(size=(4, 3)).astype(np.float32)
ADVANTAGE = np.array([1.0, -2.0, 0.5, 3.0], np.float32)
ALL = np.ones((4, 3), bool)


def test_without_a_step_the_gradient_is_the_plain_policy_gradient():
    gradient = jax.grad(lambda x: clipped_policy(x, OLD, ADVANTAGE, ALL, 0.2, 0.2)[0].sum())(OLD)
    np.testing.assert_allclose(gradient, -np.repeat(ADVANTAGE[:, None], 3, 1), rtol=1e-6)


def test_beyond_the_clip_a_gain_earns_nothing_and_a_loss_still_hurts():
    moved = OLD + np.log(np.array([1.5, 0.5, 0.5, 0.6]))[:, None].astype(np.float32)
    value, metrics = clipped_policy(moved, OLD, ADVANTAGE, ALL, 0.2, 0.3)
    np.testing.assert_allclose(value[:, 0], [-1.3, 1.6, -0.25, -1.8], rtol=1e-5)
    gradient = jax.grad(lambda x: clipped_policy(x, OLD, ADVANTAGE, ALL, 0.2, 0.3)[0].sum())(moved)
    np.testing.assert_array_equal(gradient[:2], 0)
    assert (gradient[2:] < 0).all()
    assert float(metrics["clip_fraction"][0] / metrics["clip_fraction"][1]) == 0.5
    assert float(metrics["ratio_max"][0]) == pytest.approx(1.5, rel=1e-5)


def test_what_is_masked_counts_nowhere_even_if_it_is_not_a_number():
    mask = ALL.copy()
    mask[1:, 0] = False
    broken = np.where(mask, OLD, np.nan)
    value, _ = clipped_policy(broken, OLD, ADVANTAGE, mask, 0.2, 0.2)
    np.testing.assert_array_equal(value[1:, 0], 0)
    gradient = jax.grad(lambda x: clipped_policy(x, OLD, ADVANTAGE, mask, 0.2, 0.2)[0].sum())(broken)
    assert np.isfinite(gradient).all() and (gradient[1:, 0] == 0).all()


def test_the_spread_of_the_ratio_is_that_of_the_tokens_that_count():
    mask = np.array([[1], [1], [0], [0]], bool)
    log_probs = np.log(np.array([[2.0], [2.0], [1.0], [1.0]], np.float32))
    _, metrics = clipped_policy(log_probs, np.zeros_like(log_probs), ADVANTAGE, mask, 0.2, 0.2)
    expected = pytest.approx({"clip_fraction": 0.5, "ratio_p01": 2.0, "ratio_p99": 2.0, "ratio_max": 2.0})
    assert masked.averages(metrics) == expected
    _, none = clipped_policy(log_probs, np.zeros_like(log_probs), ADVANTAGE, np.zeros_like(mask), 0.2, 0.2)
    assert masked.averages(none) == {}
    assert masked.averages(masked.add_metrics(metrics, none)) == expected


def test_reductions_are_over_tokens_over_rows_and_over_all_there_could_be():
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    mask = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]], bool)
    got = {name: [float(x) for x in reduce_tokens(name, values, mask)] for name in ("grpo", "bnpo", "dr_grpo")}
    assert got["bnpo"] == [0 + 1 + 2 + 3 + 6 + 7, 6]
    assert got["grpo"] == [1 + 3 + 6.5, 3]
    assert got["dr_grpo"] == [19, 12]
    for name, expected in got.items():  # without the last row, which has no effect
        assert [float(x) for x in reduce_tokens(name, values[:3], mask[:3], mean_rows=4)] == expected


def test_the_loss_of_grpo_is_clipped_by_its_bounds_over_the_rows_that_count(monkeypatch):
    new = OLD + np.log(np.array([[2.0], [0.5], [1.4], [np.nan]], np.float32))
    entropy = np.array([[1, 2, 3], [4, 5, 6], [1, 1, 1], [np.nan] * 3], np.float32)
    monkeypatch.setattr(scoring, "completion_log_probs", lambda *inputs: (jnp.asarray(new), jnp.asarray(entropy)))
    batch = types.SimpleNamespace(
        old_log_probs=OLD, advantage=np.array([1.0, -1.0, 2.0, 5.0]), mask=np.array([1, 1, 1, 0], bool), mean_rows=None
    )
    settings = grpo.Settings(beta=0.0, clip_low=0.1, clip_high=0.5)
    terms, metrics = grpo.make(None, settings)({}, batch, None)
    assert float(terms["policy"].sum / terms["policy"].weight) == pytest.approx((-1.5 + 0.9 - 2.8) / 3, rel=1e-5)
    assert masked.averages(metrics)["entropy"] == pytest.approx(24 / 9)


def test_a_divergence_is_weighted_by_row():
    settings = grpo.Settings(beta=0.5)
    batch = types.SimpleNamespace(
        old_log_probs=OLD, ref_log_probs=OLD - 0.1, advantage=ADVANTAGE, mean_rows=None,
        kl_scale=np.array([1.0, 1.0, 4.0, 4.0], np.float32),
    )  # fmt: skip
    terms, metrics = grpo.policy_terms(settings, OLD, ALL, batch)
    kl = np.exp(-0.1) + 0.1 - 1
    assert terms["kl"].coefficient == 0.5
    assert float(terms["kl"].sum / terms["kl"].weight) == pytest.approx(2.5 * kl, rel=1e-4)
    assert float(metrics["kl"][0] / metrics["kl"][1]) == pytest.approx(kl, rel=1e-4)
    mask = ALL.copy()
    mask[1:, 0] = False
    broken = np.where(mask, OLD, np.nan)
    gradient = jax.grad(lambda x: grpo.policy_terms(settings, x, mask, batch)[0]["kl"].sum)(broken)
    assert np.isfinite(gradient).all() and (gradient[1:, 0] == 0).all()
    batch.mean_rows = 8  # four rows were left out
    terms, _ = grpo.policy_terms(grpo.Settings(reduction="dr_grpo"), OLD, ALL, batch)
    assert terms["policy"].weight == terms["kl"].weight == 24
    batch.ref_log_probs = None
    alone, _ = grpo.policy_terms(grpo.Settings(beta=0.0), OLD, ALL, batch)
    assert set(alone) == {"policy"}
    assert jnp.isfinite(alone["policy"].sum)
