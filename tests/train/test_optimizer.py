"""AdamW and Muon, their rules and schedules, and the average of the parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blip3o_jax import treepath
from blip3o_jax.config import schema
from blip3o_jax.errors import UserError
from blip3o_jax.train.optimizer import OptimizerConfig, make_optimizer, update_average

PARAMS = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "b": {"scale": jnp.ones(4)}}


def test_cosine_follows_the_formula_of_the_recipe():
    settings = OptimizerConfig(5e-5, min_learning_rate=1e-5, warmup_steps=10)
    schedule = make_optimizer(settings, PARAMS, 110).schedule
    expected = [0, 2.5e-5, 5e-5, 1e-5 + 4e-5 * 0.5 * (1 + np.cos(np.pi * 0.25)), 3e-5, 1e-5, 1e-5]
    np.testing.assert_allclose([schedule(k) for k in (0, 5, 10, 35, 60, 110, 200)], expected, rtol=1e-5)


def test_constant_schedule_stays_after_the_warm_up():
    schedule = make_optimizer(OptimizerConfig(1e-3, schedule="constant", warmup_steps=4), PARAMS, 10).schedule
    np.testing.assert_allclose([schedule(k) for k in (0, 2, 4, 9)], [0, 5e-4, 1e-3, 1e-3], rtol=1e-6)
    flat = make_optimizer(OptimizerConfig(1e-3, min_learning_rate=1e-3), PARAMS, 10).schedule
    np.testing.assert_allclose([flat(k) for k in (0, 5, 20)], 1e-3, rtol=1e-6)


def test_adamw_equals_the_update_written_out():
    settings = OptimizerConfig(0.1, schedule="constant", b1=0.8, b2=0.95, eps=1e-2, weight_decay=0.5, clip_norm=None,
                               learning_rate_rules=(("^b", 2.0), ("", 1.0)))  # fmt: skip
    tx = make_optimizer(settings, PARAMS, 10).tx
    rng = np.random.default_rng(0)
    params, state = PARAMS, tx.init(PARAMS)
    leaves = {path: np.asarray(leaf, np.float64) for path, leaf in treepath.flatten(PARAMS).items()}
    m, v = {p: 0.0 for p in leaves}, {p: 0.0 for p in leaves}
    for step in range(1, 4):
        grads = {path: rng.normal(size=leaf.shape) for path, leaf in leaves.items()}
        updates, state = tx.update(treepath.unflatten(jax.tree.map(jnp.float32, grads)), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for path, grad in grads.items():
            m[path] = 0.8 * m[path] + 0.2 * grad
            v[path] = 0.95 * v[path] + 0.05 * grad**2
            adam = m[path] / (1 - 0.8**step) / (np.sqrt(v[path] / (1 - 0.95**step)) + 1e-2)
            decay = 0.5 if path == "a/kernel" else 0.0  # not for biases and scales
            rate = 0.2 if path.startswith("b") else 0.1
            leaves[path] = leaves[path] - rate * (adam + decay * leaves[path])
    for path, leaf in treepath.flatten(params).items():
        np.testing.assert_allclose(leaf, leaves[path], rtol=1e-5)


def test_muon_moves_the_chosen_matrices_as_optax_does_and_adam_the_rest():
    rng = np.random.default_rng(0)
    params = {"a": {"kernel": jnp.float32(rng.normal(size=(5, 3, 4)))}, "b": {"scale": jnp.ones(4)}}
    grads = [jax.tree.map(lambda leaf: jnp.float32(rng.normal(size=leaf.shape)), params) for _ in range(3)]
    settings = OptimizerConfig(
        0.1, schedule="constant", clip_norm=None, muon_momentum=0.8, muon_rules=(("kernel$", True), ("", False))
    )
    updates = _updates(make_optimizer(settings, params, 10).tx, params, grads)
    kernels = [
        _updates(
            optax.contrib.muon(0.1, beta=0.8, consistent_rms=0.2),
            params["a"]["kernel"][i],
            [g["a"]["kernel"][i] for g in grads],
        )
        for i in range(5)
    ]
    np.testing.assert_allclose(updates["a"]["kernel"], kernels, rtol=1e-4, atol=1e-6)
    scales = _updates(optax.adam(0.1), params["b"]["scale"], [g["b"]["scale"] for g in grads])
    np.testing.assert_allclose(updates["b"]["scale"], scales, rtol=1e-5)


def _updates(tx, params, grads):
    """The last of several updates, all at the same parameters."""
    state = tx.init(params)
    for grad in grads:
        updates, state = tx.update(grad, state, params)
    return updates


@pytest.mark.parametrize("box", [lambda leaf: leaf, lambda leaf: nn.LogicallyPartitioned(leaf, ("axis",) * leaf.ndim)])
def test_muon_is_refused_for_what_is_no_matrix(box):
    params = jax.tree.map(box, PARAMS)
    with pytest.raises(UserError, match=r"muon_rules: a/bias of shape \(3,\)"):
        make_optimizer(OptimizerConfig(0.1, muon_rules=(("^a", True), ("", False))), params, 10)


def test_gradients_are_clipped_by_their_global_norm():
    tx = make_optimizer(OptimizerConfig(1.0, schedule="constant", b1=0.0, b2=0.0, eps=1.0), PARAMS, 10).tx
    grads = jax.tree.map(lambda leaf: 100 * jnp.ones_like(leaf), PARAMS)
    clipped = 1 / np.sqrt(13)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["b"]["scale"], -clipped / (clipped + 1), rtol=1e-5)


def test_decay_of_bfloat16_parameters_is_not_rounded():
    params = {"kernel": jnp.full(3, 1.0078125, jnp.bfloat16)}
    tx = make_optimizer(OptimizerConfig(1.0, schedule="constant", weight_decay=0.3), params, 10).tx
    zeros = {"kernel": jnp.zeros(3)}
    updates, _ = tx.update(zeros, tx.init(zeros), params)
    np.testing.assert_allclose(updates["kernel"], -0.3 * 1.0078125, rtol=1e-6)


def test_average_starts_fast_and_keeps_its_share_later():
    old, new = {"x": jnp.zeros(2)}, {"x": jnp.ones(2, jnp.bfloat16)}
    early = update_average(old, new, 0.99, jnp.array(0))
    late = update_average(old, new, 0.99, jnp.array(100_000))
    np.testing.assert_allclose(early["x"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(late["x"], 0.01, rtol=1e-4)
    assert late["x"].dtype == jnp.float32


def test_a_parameter_without_a_rule_is_named():
    settings = OptimizerConfig(0.1, learning_rate_rules=(("^a", 1.0),))
    with pytest.raises(UserError, match="learning_rate_rules.*b/scale"):
        make_optimizer(settings, PARAMS, 10)


REFUSED = [
    ({"decay_rules": (("(", 1.0),)}, r"decay_rules\[0\]\[0\]: got '\(' - expected a regular expression"),
    ({"learning_rate": 0.0}, "learning_rate: got 0.0 - expected 1e-12 to 10000"),
    ({"min_learning_rate": 2.0}, "min_learning_rate: got 2.0 - expected at most learning_rate 1.0"),
    ({"schedule": "cosin"}, "schedule: got 'cosin' - expected cosine | constant"),
    ({"b1": 1.0}, "b1: got 1.0"),
    ({"eps": 0.0}, "eps: got 0.0"),
    ({"clip_norm": 0.0}, "clip_norm: got 0.0"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED)
def test_values_out_of_range_are_refused(wrong, message):
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        schema.from_dict(OptimizerConfig, {"learning_rate": 1.0, **wrong})
