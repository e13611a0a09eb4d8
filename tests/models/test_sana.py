"""The diffusion transformer: condition weights, groups, shapes, numerics options."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from blip3o_jax import treepath
from blip3o_jax.config import MeanFlowConfig, SanaConfig
from blip3o_jax.config.presets import SANA1P5_1P6B
from blip3o_jax.models.sana import Sana, add_gated, modulate, timestep_features
from blip3o_jax.nn.scan import split
from blip3o_jax.plan.program import read
from blip3o_jax.sharding import batch_sharding, make_mesh, shardings_of, use_mesh

CONFIG = SanaConfig(
    in_channels=4,
    out_channels=4,
    depth=3,
    num_heads=4,
    head_dim=8,
    num_cross_heads=2,
    cross_head_dim=16,
    caption_channels=12,
)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def boxed(config: SanaConfig):
    x, t, condition = jnp.zeros((1, 2, 2, config.in_channels)), jnp.zeros(1), jnp.zeros((1, 2, config.caption_channels))
    return Sana(config).init(jax.random.key(0), x, t, condition, method="denoise")["params"]


@pytest.fixture(scope="module")
def params():
    return nn.meta.unbox(jax.jit(boxed, static_argnums=0)(CONFIG))


@functools.partial(jax.jit, static_argnames=("method", "config"))
def run(params, method, *inputs, config=CONFIG):
    return Sana(config).apply({"params": params}, *inputs, method=method)


X, T, CONDITION = random(2, 3, 5, 4), np.array([13.0, 901.5], np.float32), random(2, 7, 12, seed=1)


def test_released_geometry_has_the_published_number_of_parameters():
    shapes = nn.meta.unbox(jax.eval_shape(lambda: boxed(SANA1P5_1P6B)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 1_604_641_952
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["blocks"])) == 20 * 77_929_600


def test_counted_operations_grow_with_the_condition_and_the_heads_as_those_of_the_program_do():
    config = dataclasses.replace(CONFIG, unroll=True)

    def operations(config, condition):
        shapes = jax.eval_shape(lambda: nn.meta.unbox(boxed(config)))
        x, t = jax.ShapeDtypeStruct((1, 4, 4, 4), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
        tokens = jax.ShapeDtypeStruct((1, condition, 12), jnp.float32)
        encoded = jax.eval_shape(lambda p, c: run(p, "encode_condition", c, config=config), shapes, tokens)
        program = jax.jit(lambda p, *inputs: run(p, "__call__", *inputs, config=config))
        return np.array(
            [program.lower(shapes, x, t, (encoded,)).cost_analysis()["flops"], Sana.flops(config, 16, condition)[1]]
        )

    base = operations(config, 64)
    for xla, ours in (
        operations(config, 512) - base,
        operations(dataclasses.replace(config, num_heads=1, head_dim=32), 64) - base,
    ):
        assert xla == pytest.approx(ours, rel=0.15)


def test_no_interval_and_one_of_zero_are_the_model_without_its_embedding(params):
    config = dataclasses.replace(CONFIG, mean_flow=MeanFlowConfig())
    rng = np.random.default_rng(0)
    added = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        jax.eval_shape(lambda: nn.meta.unbox(boxed(config))),
    )
    distilled = {**params, "interval_embed": added["interval_embed"]}
    plain = run(params, "denoise", X, T, CONDITION)
    np.testing.assert_array_equal(run(distilled, "denoise", X, T, CONDITION, config=config), plain)
    none, far = (run(distilled, "denoise", X, T, CONDITION, way, config=config) for way in (0 * T, T))
    np.testing.assert_allclose(none, plain, rtol=1e-5, atol=1e-5)
    assert np.abs(far - plain).max() > 0.01


@pytest.mark.parametrize("config", [CONFIG, dataclasses.replace(CONFIG, mean_flow=MeanFlowConfig())])
def test_every_parameter_names_its_axes(config):
    shapes = jax.eval_shape(lambda: boxed(config))
    leaves = jax.tree.leaves(shapes, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    assert all(len(leaf.names) == leaf.value.ndim for leaf in leaves)


@pytest.mark.parametrize("count", [2, 6])
def test_equal_condition_tokens_are_one_with_the_log_of_their_number(params, count):
    other = random(2, 3, 12, seed=2)
    token = random(2, 1, 12, seed=3)
    many = run(params, "denoise", X, T, np.concatenate([np.repeat(token, count, 1), other], 1))
    log_weight = np.tile(np.log([count, 1, 1, 1]).astype(np.float32), (2, 1))
    tokens = np.concatenate([token, other], 1)
    log_weight[1], tokens[1] = log_weight[1, ::-1], tokens[1, ::-1].copy()  # weights belong to their row
    one = run(params, "encode_condition", tokens, log_weight)
    np.testing.assert_allclose(run(params, "__call__", X, T, (one,)), many, atol=1e-5)
    unweighted = dataclasses.replace(one, log_weight=None)
    assert np.abs(run(params, "__call__", X, T, (unweighted,)) - many).max() > 1e-3


def test_a_single_condition_token_equals_many_equal_ones(params):
    token = random(1, 1, 12, seed=3)
    single = run(params, "encode_condition", token)
    many = run(params, "denoise", X, T, np.tile(token, (2, 9, 1)))
    np.testing.assert_allclose(run(params, "__call__", X, T, (single,)), many, atol=1e-5)


def test_groups_attend_to_their_own_condition_only(params):
    null = run(params, "encode_condition", random(1, 2, 12, seed=4), np.log(np.array([[5.0, 2.0]], np.float32)))
    conditioned = run(params, "encode_condition", CONDITION)
    both = run(params, "__call__", np.concatenate([X, X]), np.concatenate([T, T]), (null, conditioned))
    np.testing.assert_allclose(both[:2], run(params, "__call__", X, T, (null,)), atol=1e-5)
    np.testing.assert_allclose(both[2:], run(params, "__call__", X, T, (conditioned,)), atol=1e-5)


def test_blocks_move_no_row_between_devices(params):
    mesh = make_mesh({"data": 4}, jax.devices()[:4])
    null = run(params, "encode_condition", random(1, 2, 12, seed=4))
    conditioned = run(params, "encode_condition", random(4, 7, 12))
    x, t = random(8, 3, 5, 4), np.linspace(1, 900, 8, dtype=np.float32)
    expected = run(params, "__call__", x, t, (null, conditioned))
    with use_mesh(mesh):
        rows = jax.device_put((x, t), batch_sharding(mesh, 1, 8))
        spread = jax.tree.map(
            lambda y: jax.device_put(y, NamedSharding(mesh, PartitionSpec(None, "data"))), conditioned
        )
        compiled = run.lower(params, "__call__", *rows, (null, spread)).compile()
        got = compiled(params, *rows, (null, spread))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    moved = sum(each.bytes for each in read(compiled, mesh).collectives)
    assert moved < 3 * x.nbytes  # into the order of the blocks and back; activations of a block are eight times as many


def test_split_blocks_compute_what_stacked_ones_do(params):
    apart = {**params, "blocks": split(params["blocks"])}
    x, t, tokens = np.concatenate([X, X]), np.concatenate([T, T]), random(1, 1, 12, seed=3)

    def guided(params):
        conditions = tuple(run(params, "encode_condition", condition) for condition in (tokens, CONDITION))
        return conditions[1].key, run(params, "__call__", x, t, conditions)

    (keys, got), (stacked, expected) = guided(apart), guided(params)
    assert [key.shape for key in keys] == [stacked.shape[1:]] * 3
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_what_is_split_is_not_split_again(params):
    once = split(params["blocks"])
    twice = split(once)
    jax.tree.map(np.testing.assert_array_equal, once, twice)
    table = twice["scale_shift_table"]
    assert len(table) == 3 and table[0].shape == params["blocks"]["scale_shift_table"].shape[1:]


def test_order_of_condition_tokens_does_not_matter(params):
    expected = run(params, "denoise", X, T, CONDITION)
    np.testing.assert_allclose(run(params, "denoise", X, T, CONDITION[:, ::-1]), expected, atol=1e-5)


@functools.partial(jax.jit, static_argnums=1)
def loss_and_gradient(params, config):
    return jax.value_and_grad(lambda params: jnp.square(run(params, "denoise", X, T, CONDITION, config=config)).mean())(
        params
    )


@pytest.mark.parametrize(("remat", "unroll"), [("none", True), ("full", False), ("dots", False), ("full", True)])
def test_rematerialisation_and_unrolling_change_neither_values_nor_gradients(params, remat, unroll):
    expected, expected_gradient = loss_and_gradient(params, CONFIG)
    got, gradient = loss_and_gradient(params, dataclasses.replace(CONFIG, remat=remat, unroll=unroll))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, expected_gradient)


def test_bfloat16_stays_close_and_returns_float32(params):
    expected = run(params, "denoise", X, T, CONDITION)
    got = run(params, "denoise", X, T, CONDITION, config=dataclasses.replace(CONFIG, dtype="bfloat16"))
    assert got.dtype == jnp.float32
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


def test_modulation_and_gates_are_rounded_once_in_bfloat16():
    x, y = (random(2, 9, 64, seed=seed).astype(jnp.bfloat16) for seed in (0, 1))
    shift, scale, gate = (random(2, 1, 64, seed=seed) for seed in (2, 3, 4))
    exact_x, exact_y = x.astype(np.float64), y.astype(np.float64)
    normal = (exact_x - exact_x.mean(-1, keepdims=True)) / exact_x.std(-1, keepdims=True)
    for got, exact in (
        (add_gated(x, gate, y), exact_x + gate * exact_y),
        (modulate(x, shift, scale, 0.0), normal * (1 + scale) + shift),
    ):
        assert got.dtype == jnp.bfloat16
        assert np.mean(got != exact.astype(jnp.bfloat16)) < 0.01


def test_modulation_by_bfloat16_parameters_is_added_up_in_float32(params):
    """The output is what bfloat16 would lose of 1 + 2^-9, a gate of the first block or a shift of the last norm."""
    signs, little = jnp.where(jnp.arange(32) % 2, 1.0, -1.0), 2.0**-9
    zeros = treepath.flatten(jax.tree.map(jnp.zeros_like, params))
    zeros |= {"patch_embed/bias": signs, "proj_out/kernel": jnp.eye(32, 4)}
    gate = {
        "blocks/self_attention/out/bias": zeros["blocks/self_attention/out/bias"].at[0].set(-signs),
        "blocks/scale_shift_table": zeros["blocks/scale_shift_table"].at[0, 2].set(little),
        "time_modulation/bias": zeros["time_modulation/bias"].at[64:96].set(1),
    }
    shift = {
        "scale_shift_table": zeros["scale_shift_table"].at[0].set(little).at[1].set(-1),
        "time_embed/out/bias": jnp.ones(32),
    }
    config = dataclasses.replace(CONFIG, dtype="bfloat16", param_dtype="bfloat16")
    for leaves, expected in ((gate, -signs / np.sqrt(1 + 1e-6 / little**2)), (shift, signs + 1 + little)):
        low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), treepath.unflatten(zeros | leaves))
        got = run(low, "denoise", X, T, CONDITION, config=config)
        np.testing.assert_allclose(got, np.broadcast_to(expected[:4], X.shape), rtol=0.01)


def test_times_are_scaled(params):
    config = dataclasses.replace(CONFIG, timestep_scale=4.0)
    got, expected = run(params, "denoise", X, T / 4, CONDITION, config=config), run(params, "denoise", X, T, CONDITION)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_timestep_features_agree_with_float64():
    t = np.array([0.0, 33.333, 966.6667, 1000.0], np.float32)
    angles = t.astype(np.float64)[:, None] * np.exp(-np.log(1e4) * np.arange(128) / 128)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(timestep_features(jnp.asarray(t)), expected, atol=2e-4)


def test_the_last_norm_leaves_small_states_small(params):
    """A model of zeros passes the bias of its patch embedding on to that norm, which is the output's first channels."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    bias = jnp.where(jnp.arange(32) % 2, 1e-3, -1e-3)
    identity = {**zeros["proj_out"], "kernel": jnp.eye(32, 4)}
    passing = {**zeros, "patch_embed": {**zeros["patch_embed"], "bias": bias}, "proj_out": identity}
    expected = np.broadcast_to(np.where(np.arange(4) % 2, 1, -1) * 1e-3 / np.sqrt(1e-6 + 1e-6), X.shape)
    np.testing.assert_allclose(run(passing, "denoise", X, T, CONDITION), expected, rtol=1e-4)


def test_the_blocks_start_unlike_each_other_and_their_tables_small(params):
    for name, leaf in (("kernel", params["blocks"]["self_attention"]["query"]["kernel"]),
                       ("table", params["blocks"]["scale_shift_table"])):  # fmt: skip
        assert len({float(block.sum()) for block in leaf}) == CONFIG.depth, name
    assert np.std(params["blocks"]["scale_shift_table"]) == pytest.approx(CONFIG.width**-0.5, rel=0.15)


def test_the_embedding_of_intervals_starts_without_effect():
    config = dataclasses.replace(CONFIG, mean_flow=MeanFlowConfig())
    last = jax.jit(lambda: nn.meta.unbox(boxed(config))["interval_embed"]["out"])()
    assert not any(np.any(leaf) for leaf in last.values())


def test_eight_devices_compute_what_one_does(params):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shardings = shardings_of(jax.eval_shape(lambda: boxed(CONFIG)), mesh)
    assert any(leaf.spec != PartitionSpec() for leaf in jax.tree.leaves(shardings))
    x, t, condition = (np.concatenate([value, value]) for value in (X, T, CONDITION))
    expected = run(params, "denoise", x, t, condition)
    with use_mesh(mesh):
        got = jax.jit(lambda params: run(params, "denoise", x, t, condition))(jax.device_put(params, shardings))
    np.testing.assert_allclose(got, expected, atol=1e-5)
