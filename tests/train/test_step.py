"""The training step: exact accumulation, layouts, frozen leaves, updates that are not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from blip3o_jax import masked, sharding
from blip3o_jax.errors import UserError
from blip3o_jax.train.optimizer import OptimizerConfig, make_optimizer, make_schedule, update_average
from blip3o_jax.train.step import (
    LossTerm,
    Scheduled,
    abstract_state,
    compile_step,
    create_state,
    init_state,
    make_evaluation,
    make_train_step,
    step_key,
)
from support import toy

MESHES = [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]


def steps(mesh_shape=None, num_steps=20, rows=32, loss=toy.loss_fn, source=None, **optimizer):
    """Losses of the steps, the last state and the last metrics."""
    mesh = None if mesh_shape is None else sharding.make_mesh(mesh_shape)
    run = toy.make_run(mesh, loss=loss, optimizer=optimizer)
    tx = make_optimizer(run.optimizer, run.abstract_params, 100)
    source = source or toy.Source(rows)
    with sharding.use_mesh(mesh):
        layout = abstract_state(run.abstract_params, tx, mesh)
        state = init_state(run.init_params(), tx, layout, mesh)
        step = compile_step(make_train_step(loss, tx, 0, run.optimizer.accumulation), layout, mesh)
        losses = []
        for _ in range(num_steps):
            batch = sharding.shard_batch(source.next(None, None), mesh, run.optimizer.accumulation)
            state, metrics = step(state, run.frozen, batch)
            losses.append(float(metrics["loss"][0]))
    assert step._cache_size() == 1
    return np.array(losses), state, metrics


@functools.cache
def reference():
    """Twenty steps on one device."""
    return steps()


def assert_close(left, right, rtol):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_eight_devices_compute_what_one_computes(shape):
    losses, state, _ = reference()
    others, other, _ = steps(shape)
    np.testing.assert_allclose(others, losses, rtol=1e-5)
    assert_close(other.params, state.params, 1e-5)


@pytest.mark.parametrize("shape", [None, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_accumulated_gradients_are_those_of_the_big_batch(shape):
    losses, state, metrics = reference()
    others, other, other_metrics = steps(shape, accumulation=4)
    np.testing.assert_allclose(others, losses, rtol=5e-6)
    assert_close(other.params, state.params, 5e-6)
    assert float(metrics["loss_square"][1]) == float(other_metrics["loss_square"][1])  # weights are counts
    assert_close(other_metrics, metrics, 5e-6)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_bfloat16_parameters_have_float32_sums_moments_and_averages(accumulation):
    def loss(params, batch, keys):
        return {"product": LossTerm((params["w"].astype(jnp.float32) * batch["x"]).sum(), len(batch["x"]))}, {}

    settings = OptimizerConfig(1e-2, schedule="constant", b2=0.5, clip_norm=None, ema_decay=0.9)
    params = {"w": jnp.ones((), jnp.bfloat16)}
    tx = make_optimizer(settings, params, 10)
    batch = {"x": jnp.array([256.0, 1, 1, 1] if accumulation == 4 else [1.0078125] * 4)}
    state, metrics = jax.jit(make_train_step(loss, tx, 0, accumulation))(create_state(params, tx), {}, batch)
    gradient = float(batch["x"].mean())  # not representable after a sum, or a square, in bfloat16
    assert float(metrics["grad_norm"][0]) == gradient
    moments = state.opt_state[0]
    np.testing.assert_allclose(moments.nu["w"], 0.5 * gradient**2, rtol=1e-6)
    assert (state.params["w"].dtype, moments.mu["w"].dtype, state.ema["w"].dtype) == (jnp.bfloat16, *[jnp.float32] * 2)


def test_weights_of_micro_batches_cost_no_network():
    run = toy.make_run(optimizer={"accumulation": 4, "ema_decay": None})
    tx = make_optimizer(run.optimizer, run.abstract_params, 100)
    layout = abstract_state(run.abstract_params, tx, None)
    batch = toy.Source(32).next(None, None)

    def products(accumulation):
        step = jax.jit(make_train_step(toy.loss_fn, tx, 0, accumulation))
        return step.lower(layout, run.frozen, batch).compile().as_text().count(" dot(")

    assert products(4) <= products(1)


def test_state_lies_where_its_parameters_lie():
    _, state, _ = steps({"fsdp": 4, "tensor": 2}, num_steps=1)
    moments = state.opt_state[1]
    for tree in (moments.mu, moments.nu, state.ema):
        for leaf, parameter in zip(jax.tree.leaves(tree), jax.tree.leaves(state.params), strict=True):
            assert leaf.sharding == parameter.sharding
            assert leaf.dtype == jnp.float32
    assert state.params["hidden"]["kernel"].sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor")


def test_an_initial_state_is_placed_and_shares_no_buffers():
    run, mesh = toy.make_run(), sharding.make_mesh({"fsdp": 4}, jax.devices()[:4])
    tx = make_optimizer(run.optimizer, run.abstract_params, 100)
    start = jax.device_put(run.init_params(), jax.devices()[0])
    state = create_state(start, tx)
    assert all(a is not b for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.ema), strict=True))
    state = init_state(start, tx, abstract_state(run.abstract_params, tx, mesh), mesh)
    assert len(state.params["hidden"]["kernel"].devices()) == 4


@pytest.mark.parametrize("shape", [None, {"fsdp": 4}], ids=str)
def test_parameters_and_states_are_donated(shape):
    mesh = None if shape is None else sharding.make_mesh(shape, jax.devices()[:4])
    run = toy.make_run(mesh)
    tx = make_optimizer(run.optimizer, run.abstract_params, 100)
    layout, params = abstract_state(run.abstract_params, tx, mesh), run.init_params()
    with sharding.use_mesh(mesh):
        state = init_state(params, tx, layout, mesh)
        step = compile_step(make_train_step(toy.loss_fn, tx, 0), layout, mesh)
        step(state, run.frozen, sharding.shard_batch(toy.Source(8).next(None, None), mesh, 1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((params, state)))


def test_frozen_leaves_have_neither_moments_nor_averages():
    run = toy.make_run()
    tx = make_optimizer(run.optimizer, run.abstract_params, 100)
    layout = abstract_state(run.abstract_params, tx, None)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(layout)[0]]
    assert any("hidden" in path for path in paths)
    assert not any("frozen" in path for path in paths)


def test_an_update_that_is_not_finite_is_left_out_and_counted():
    _, before, _ = steps(num_steps=2)
    losses, after, metrics = steps(num_steps=3, source=toy.Source(32, broken=(2,)))
    assert not np.isfinite(losses[2])
    assert_close(after.params, before.params, 0)
    assert_close((after.opt_state, after.ema), (before.opt_state, before.ema), 0)
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (3, 1, 1)
    assert float(metrics["skipped_in_a_row"][0]) == 1
    losses, after, metrics = steps(num_steps=4, source=toy.Source(32, broken=(2,)))
    assert np.isfinite(losses[3])
    assert (int(after.skipped), int(after.skipped_in_a_row)) == (1, 0)
    schedule = make_schedule(OptimizerConfig(1e-2, warmup_steps=2), 100)
    assert float(metrics["lr"][0]) == pytest.approx(float(schedule(2))), "rate and average go by updates, not steps"
    assert_close(after.ema, update_average(before.ema, after.params, 0.9, jnp.int32(2)), 1e-6)


@pytest.mark.parametrize("which", ["loss", "gradients"])
def test_a_loss_or_gradients_alone_that_are_not_finite_leave_the_update_out(which):
    def loss(params, batch, keys):
        terms, metrics = toy.loss_fn(params, batch, keys)
        zero = 0 * params["out"]["bias"].sum()
        wrong = zero + jnp.inf if which == "loss" else jnp.sqrt(zero)  # with gradient 0 and infinity
        return {**terms, "wrong": LossTerm(wrong, jnp.float32(1))}, metrics

    losses, state, metrics = steps(num_steps=1, loss=loss)
    assert (np.isfinite(losses[0]), np.isfinite(float(metrics["grad_norm"][0]))) == (which != "loss", which == "loss")
    assert (int(state.step), int(state.skipped)) == (1, 1)


def test_a_term_without_weight_contributes_nothing():
    def loss(params, batch, keys):
        terms, metrics = toy.loss_fn(params, batch, keys)
        empty = jnp.zeros(())
        return {**terms, "absent": LossTerm(empty, empty)}, metrics

    losses, _, metrics = steps(num_steps=2, loss=loss)
    np.testing.assert_array_equal(losses, reference()[0][:2])
    assert float(metrics["loss_absent"][1]) == 0


def test_a_scheduled_loss_knows_its_step_and_micro_batches_share_its_draw():
    def at(step, key):
        drawn = jax.random.uniform(key)

        def loss(params, batch, keys):
            terms, _ = toy.loss_fn(params, batch, keys)
            return terms, {"step": masked.metric(step[None]), "drawn": masked.metric(drawn[None])}

        return loss

    def last(num_steps, **optimizer):
        metrics = steps(num_steps=num_steps, loss=Scheduled(at, toy.loss_fn), **optimizer)[2]
        return [float(total / weight) for total, weight in (metrics["step"], metrics["drawn"])]

    first, second, parts = last(1), last(2), last(2, accumulation=4)
    assert (first[0], second[0]) == (0, 1)
    assert first[1] != second[1]
    assert first[1] == pytest.approx(float(jax.random.uniform(step_key(0, 0, "schedule"))))
    assert parts == pytest.approx(second, rel=1e-6)


def test_random_numbers_of_a_row_do_not_depend_on_the_number_of_rows():
    def loss(params, batch, keys):
        noise = jax.vmap(lambda key: jax.random.normal(key, (2,)))(keys)
        terms, _ = toy.loss_fn(params, batch, keys)
        apart = jnp.abs(noise[1:] - noise[:-1])
        return terms, {"first": masked.metric(noise[:4]), "all": masked.metric(noise), "apart": masked.metric(apart)}

    (_, _, few), (_, _, many) = steps(num_steps=1, rows=4, loss=loss), steps(num_steps=1, rows=8, loss=loss)
    np.testing.assert_array_equal(few["first"], many["first"])
    assert float(many["all"][0]) != float(many["first"][0])
    assert float(many["apart"][0]) > 0, "every row has numbers of its own"
    assert float(steps(num_steps=2, rows=4, loss=loss)[2]["first"][0]) != float(few["first"][0]), "and every step"


def test_rows_that_do_not_divide_are_refused_in_one_line():
    with pytest.raises(UserError, match="multiple of 16"):
        steps({"data": 8}, rows=24, accumulation=2)
    with pytest.raises(UserError, match="accumulation"):
        steps(rows=31, accumulation=2)
    run = toy.make_run()
    batch = {**toy.Source(4).next(None, None), "kind": jnp.zeros(3, bool)}
    with pytest.raises(UserError, match="batch: got leading dimensions .* expected one number of rows"):
        make_evaluation(toy.loss_fn, 0)(run.init_params(), run.frozen, batch, 0)


def test_the_loss_is_the_sum_of_terms_by_their_coefficients():
    losses, _, metrics = steps(num_steps=1)
    square, size = (float(total / weight) for total, weight in (metrics["loss_square"], metrics["loss_size"]))
    assert losses[0] == pytest.approx(square + 0.1 * size, rel=1e-6)


def test_a_reparametrisation_is_part_of_the_step_and_of_the_evaluation():
    """As an adapter does it: a product of what trains is added to what is frozen."""
    whole = meta.unbox(toy.init(jax.random.key(0)))
    frozen = {**whole, "adapter": {"a": jnp.ones((toy.WIDTH, 1))}}
    params = {"adapter": {"b": jnp.full((1, 4 * toy.WIDTH), 0.01)}}

    def adapted(tree):
        low_rank = tree["adapter"]["a"] @ tree["adapter"]["b"]
        return {**tree, "hidden": {**tree["hidden"], "kernel": tree["hidden"]["kernel"] + low_rank}}

    tx = make_optimizer(OptimizerConfig(1e-2, schedule="constant"), params, 5)
    batch = toy.Source().next(None, None)
    step = jax.jit(make_train_step(toy.loss_fn, tx, 0, reparametrise=adapted))
    state, metrics = step(create_state(params, tx), frozen, batch)
    assert set(state.params) == {"adapter"} and float(metrics["grad_norm"][0]) > 0
    evaluated, _ = jax.jit(make_evaluation(toy.loss_fn, 0, adapted))(params, frozen, batch, 0)
    second, _ = jax.jit(make_evaluation(toy.loss_fn, 0, adapted))(params, frozen, batch, 1)
    assert float(second["loss_square"][0]) != float(evaluated["loss_square"][0]), "every batch has numbers of its own"
    merged, _ = jax.jit(make_evaluation(toy.loss_fn, 0))(adapted({**params, **frozen, "adapter": {
        **params["adapter"], **frozen["adapter"]}}), {}, batch, 0)  # fmt: skip
    assert float(evaluated["loss_square"][0]) == float(merged["loss_square"][0])
    assert float(evaluated["loss_square"][0]) == float(metrics["loss_square"][0])


@pytest.mark.parametrize(
    "result, message",
    [
        (None, "loss function: got None - expected a tuple of 2 dictionaries"),
        (jnp.float32(1), r"loss function: got an array float32\[\] - expected a tuple of 2"),
        (({}, {}), "loss function: terms: got none"),
        (({"a": jnp.float32(1)}, {}), r"term a: got an array float32\[\] - expected a LossTerm of scalars"),
        (
            ({"a": LossTerm(jnp.ones(2), 1.0)}, {}),
            r"term a: got \(an array float32\[2\], a float, a float\) - expected",
        ),
        (({"a": LossTerm(None, 1.0)}, {}), r"term a: got \(None, a float, a float\)"),
        (({"a": LossTerm(1.0, 1.0)}, {"b": 3.0}), "metric b: got a float - expected a tuple of 2 scalars"),
        (({"a": LossTerm(1.0, 1.0)}, {"b": (1.0, jnp.ones(3))}), r"metric b: got \(a float, an array float32\[3\]\)"),
    ],
)
def test_what_a_loss_function_returns_is_checked(result, message):
    loss = lambda params, batch, keys: result  # noqa: E731
    with pytest.raises(UserError, match=message):
        steps(loss=loss, num_steps=1)
    run = toy.make_run()
    with pytest.raises(UserError, match=message):
        make_evaluation(loss, 0)(run.init_params(), run.frozen, toy.Source(4).next(None, None), 0)
