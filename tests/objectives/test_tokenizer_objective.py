"""The image tokenizer's objective: who gets which gradient, pool scales, codebook use, and codebooks from data."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax import masked, sharding, treepath
from blip3o_jax.config import TATokConfig, ViTConfig, schema
from blip3o_jax.config.presets import preset
from blip3o_jax.errors import UserError
from blip3o_jax.models.ta_tok import TATok
from blip3o_jax.objectives import tokenizer
from blip3o_jax.train.step import make_evaluation
from support.small import image_batch, jit, params_of, train

MODEL = dataclasses.replace(
    preset("tiny"),
    image_tokenizer=TATokConfig(
        encoder=ViTConfig(3, 24, 1, 32, 2, patch_size=4, num_positions=36, final_norm=False),
        decoder=ViTConfig(12, 24, 1, 32, 2, patch_size=1, num_positions=16, final_norm=True),
        image_size=27,
        bottleneck_dim=12,
        codebook_size=64,
    ),
)
BOTH = {"features": {}, "pixels": {"hidden": 32}}


def settings_of(**values) -> tokenizer.Settings:
    return schema.from_dict(tokenizer.Settings, {**BOTH, **values})


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """Two flat colours, divided at some column, in [-1, 1]."""
    rng = np.random.default_rng(seed)
    side = MODEL.image_tokenizer.image_size
    left, right = rng.uniform(-1, 1, (2, count, 1, 1, 3))
    inside = np.arange(side)[None, None, :, None] < rng.integers(6, side - 6, (count, 1, 1, 1))
    return np.broadcast_to(np.where(inside, left, right), (count, side, side, 3)).astype(np.float32)


@functools.cache
def loss_of(settings: tokenizer.Settings):
    """The loss function; one per settings, so that its programs are compiled once."""
    return tokenizer.make(MODEL, settings)


@functools.cache
def start():
    pixels = jnp.zeros((1, *PIXELS.shape[1:]))
    extra = tokenizer.extra_modules(MODEL, settings_of())

    def make(key):
        model = TATok(MODEL.image_tokenizer).init(key, pixels)["params"]
        return {"image_tokenizer": model, **{name: init(key) for name, init in extra.items()}}

    return params_of(make)


PIXELS = pictures(8)
BATCH = image_batch(target_tokenizer_pixels=PIXELS)
KEYS = jax.random.split(jax.random.key(7), 8)
TRAINABLE = (("^teacher", False), ("", True))


def sums_of(settings: tokenizer.Settings):
    """(index of the pool scale, parameters) -> sums of the terms, metrics."""

    def run(index, params):
        terms, metrics = tokenizer._loss(MODEL, settings, index, params, BATCH, KEYS)
        return {name: term.sum for name, term in terms.items()}, metrics

    return run


@functools.cache
def judge(settings: tokenizer.Settings):
    """`sums_of`, compiled."""
    return jit(sums_of(settings))


def call(method: str, *inputs, params=None):
    """A method of the tokenizer, compiled."""
    return jit(lambda params, *x: tokenizer._apply(MODEL, params, method, *x))(params or start(), *inputs)


def touched(gradients: dict[str, float], prefix: str) -> bool:
    found = [value for path, value in gradients.items() if path.startswith(prefix)]
    assert found, prefix
    return max(found) > 0


def test_every_term_moves_what_it_should_and_nothing_else():
    sums = sums_of(settings_of(pool_scales=[1], unquantized_share=0.0))
    jacobian = jit(jax.jacrev(lambda params: sums(0, params)[0]))(start())
    gradients = {
        name: {path: np.abs(leaf).max() for path, leaf in treepath.flatten(tree).items()}
        for name, tree in jacobian.items()
    }
    assert set(gradients) == {"codebook", "commitment", "feature", "pixel"}
    tower, table, back = "image_tokenizer/encoder", "image_tokenizer/quantizer", "image_tokenizer/decoder"
    expected = {  # encoder, codebook, decoder, pixel head
        "codebook": (False, True, False, False),
        "commitment": (True, False, False, False),
        "feature": (True, False, True, False),
        "pixel": (True, False, True, True),
    }
    for name, wanted in expected.items():
        got = tuple(touched(gradients[name], prefix) for prefix in (tower, table, back, "pixel_head"))
        assert got == wanted, name
        assert not touched(gradients[name], "teacher"), name


def test_losses_of_a_small_batch_fall_at_all_pool_scales():
    params, frozen = treepath.partition(start(), TRAINABLE)
    history, _ = train(loss_of(settings_of()), params, BATCH, 60, frozen)
    first, last = (
        {name: np.mean([m[name] for m in part]) for name in history[0]} for part in (history[:5], history[-5:])
    )
    for name in ("loss", "loss_feature", "loss_pixel"):
        assert last[name] < 0.6 * first[name], name
    assert last["psnr"] > first["psnr"] + 2
    assert last["perplexity"] > 3


def test_each_drawn_branch_is_the_loss_at_its_own_scale():
    settings = settings_of(features=None, unquantized_share=0.5)
    for index, scale in enumerate(settings.pool_scales):
        got = judge(settings)(index, start())
        expected = judge(dataclasses.replace(settings, pool_scales=(scale,)))(0, start())
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, expected)


def test_scales_are_drawn_from_the_key_of_the_step():
    loss = tokenizer.make(MODEL, settings_of(pool_scales=[1, 2, 2, 3]))
    drawn = [int(loss.at(0, jax.random.key(i)).args[2]) for i in range(40)]
    assert set(drawn) == {0, 1, 2, 3}


def test_unquantised_rows_are_decoded_from_what_was_to_be_quantised():
    def pixel_loss(share):
        terms, metrics = judge(settings_of(features=None, pool_scales=[1], unquantized_share=share))(0, start())
        return float(terms["pixel"]), float(metrics["psnr"][1])

    quantised, bare, some = pixel_loss(0.0), pixel_loss(1 - 1e-7), pixel_loss(0.5)
    assert (quantised[1], bare[1]) == (8, 0) and 0 < some[1] < 8  # psnr tells of quantised rows alone
    assert quantised[0] != pytest.approx(bare[0], rel=1e-3)
    decoded = call("decode", call("encode", PIXELS).z)
    seen = tokenizer._pixel_head(MODEL, settings_of()).apply({"params": start()["pixel_head"]}, decoded)
    target = tokenizer.pooled_pixels(MODEL, PIXELS, 1)
    assert bare[0] == pytest.approx(float(jnp.square(seen - target).mean((1, 2, 3)).sum()), rel=1e-5)


def test_held_out_batches_use_the_model_as_it_is_used():
    settings = settings_of(features=None, unquantized_share=0.9, stochastic_codes=True)
    evaluate = jit(make_evaluation(loss_of(settings), 0))
    (first, _), (second, _) = (evaluate(start(), {}, BATCH, index) for index in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert float(first["psnr"][1]) == 8


def test_held_out_batches_have_the_scale_of_the_model():
    settings = settings_of(pool_scales=[2, 3], stochastic_codes=True, codebook_weight=0.3)
    _, own, drawn = tokenizer.make(MODEL, settings).held_out.args
    assert (own.pool_scales[drawn], own.stochastic_codes, own.unquantized_share) == (MODEL.pool_scale, False, 0)


def test_every_term_has_its_weight():
    weights = {"codebook_weight": 0.3, "commitment_weight": 0.5}
    settings = settings_of(**weights, features={"weight": 2.0}, pixels={"weight": 3.0})
    values = {name: jnp.arange(4.0) for name in ("codebook", "commitment", "feature", "pixel", "psnr", "code_cosine")}
    values |= {"perplexity": jnp.float32(5), "codes_used": jnp.float32(0.5)}
    terms, metrics = tokenizer._terms_and_metrics(settings, values, jnp.array([False, False, True, True]))
    expected = {"codebook": 0.3, "commitment": 0.5, "feature": 2.0, "pixel": 3.0}
    assert {name: term.coefficient for name, term in terms.items()} == expected
    assert all(float(term.sum / term.weight) == 1.5 for term in terms.values())
    expected = {"perplexity": 5, "codes_used": 0.5, "images": 4, "code_cosine": 1.5, "psnr": 0.5}  # of quantised rows
    assert masked.averages(metrics) == expected


@pytest.mark.parametrize("kind", ["cosine", "l2"])
def test_distances_of_features_are_their_formulas(kind):
    features, target = np.random.default_rng(0).normal(size=(2, 3, 5, 7))
    cosine = (features * target).sum(axis=-1) / np.linalg.norm(features, axis=-1) / np.linalg.norm(target, axis=-1)
    expected = {"cosine": 1 - cosine.mean(axis=1), "l2": np.square(features - target).mean(axis=(1, 2))}[kind]
    got = tokenizer._feature_distance(kind, jnp.asarray(features, jnp.float32), jnp.asarray(target, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_drawn_codes_differ_from_the_nearest_ones():
    def cosine(stochastic):
        settings = settings_of(features=None, pool_scales=[1], unquantized_share=0.0, stochastic_codes=stochastic)
        return float(judge(settings)(0, start())[1]["code_cosine"][0])

    assert cosine(True) < cosine(False)


def test_perplexity_and_codes_in_use_agree_with_their_definitions():
    _, metrics = judge(settings_of(features=None, pool_scales=[1], unquantized_share=0.0))(0, start())
    _, counts = np.unique(call("encode", PIXELS).indices, return_counts=True)
    share = counts / counts.sum()
    assert float(metrics["perplexity"][0]) / 8 == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)
    assert float(metrics["codes_used"][0]) / 8 == pytest.approx(len(counts) / 64)


def test_pixel_targets_are_means_at_the_resolution_of_the_codes():
    pixels = pictures(2)
    for scale, side in ((1, 24), (2, 12), (3, 8)):
        target = np.asarray(tokenizer.pooled_pixels(MODEL, pixels, scale))
        assert target.shape == (2, side, side, 3)
        cell = pixels[:, 2 * scale : 3 * scale, 4 * scale : 5 * scale].mean((1, 2))
        np.testing.assert_allclose(target[:, 2, 4], cell, atol=1e-6)


def test_a_codebook_starts_from_outputs_of_the_encoder():
    settings = settings_of(features=None, pool_scales=[1], unquantized_share=0.0)
    key = jax.random.key(5)
    bias = "image_tokenizer/quantizer/projection/bias"
    before = treepath.flatten(start()) | {bias: np.random.default_rng(0).normal(size=12).astype(np.float32)}
    params = jit(lambda params: tokenizer.initialise_codebook(MODEL, settings, params, BATCH, key))(
        treepath.unflatten(before)
    )
    after = treepath.flatten(params)
    changed = [path for path in before if not np.array_equal(before[path], after[path])]
    assert changed == ["image_tokenizer/quantizer/embedding/table"]
    z = np.asarray(call("encode", PIXELS, params=params).z).reshape(-1, 12)
    codebook = np.asarray(call("codebook", params=params))
    assert (codebook @ z.T).max(axis=1).min() > 0.97  # every code is near some output
    assert np.abs(np.linalg.norm(codebook, axis=1) - 1).max() < 1e-5
    kernel = before[bias.replace("bias", "kernel")]
    lengths = [np.linalg.norm(flat[changed[0]] @ kernel + before[bias], axis=1) for flat in (before, after)]
    np.testing.assert_allclose(lengths[1], lengths[0].mean(), rtol=1e-4)  # learning rates still fit
    cosine = codebook @ codebook.T - 2 * np.eye(len(codebook))
    assert cosine.max() < 1 - 1e-5  # and no two are equal

    def use(params):
        return float(judge(settings)(0, params)[1]["codes_used"][0])

    assert use(params) > 1.2 * use(start())


def test_rare_outputs_are_chosen_beside_many_that_are_alike():
    kinds = np.eye(3, 8)[np.repeat([0, 1, 2], [980, 10, 10])] + 1e-3 * np.random.default_rng(0).normal(size=(1000, 8))
    z = jnp.asarray(kinds / np.linalg.norm(kinds, axis=1, keepdims=True), jnp.float32)
    for seed in range(8):
        rows = np.asarray(jit(tokenizer.spread_choice, static_argnums=2)(jax.random.key(seed), z, 3))
        assert sorted(rows.argmax(axis=1)) == [0, 1, 2]


def test_outputs_at_more_than_the_separation_are_different_kinds():
    rare = np.array([1 - 0.3**2 / 2, np.sqrt(1 - (1 - 0.3**2 / 2) ** 2)])  # a unit vector at the distance 0.3
    z = jnp.asarray(np.array([[1.0, 0.0]] * 990 + [rare] * 10), jnp.float32)
    for seed in range(4):
        rows = np.asarray(jit(tokenizer.spread_choice, static_argnums=2)(jax.random.key(seed), z, 2))
        assert len(np.unique(rows, axis=0)) == 2


def test_faint_shades_of_one_kind_share_a_code():
    kinds = np.eye(3, 8)[np.repeat([0, 1, 2], [4000, 10, 10])] + 0.025 * np.random.default_rng(1).normal(size=(4020, 8))
    z = jnp.asarray(kinds / np.linalg.norm(kinds, axis=1, keepdims=True), jnp.float32)
    for seed in range(8):
        rows = np.asarray(jit(tokenizer.spread_choice, static_argnums=2)(jax.random.key(seed), z, 6))
        assert sorted(rows[:3].argmax(axis=1)) == [0, 1, 2]


def test_eight_devices_compute_what_one_computes():
    loss = loss_of(settings_of(pool_scales=[2]))

    def value(params, batch):
        terms, metrics = loss.at(0, jax.random.key(0))(params, batch, KEYS)
        return {name: term.sum for name, term in terms.items()}, metrics

    expected = jit(value)(start(), BATCH)
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
    with sharding.use_mesh(mesh):
        got = jit(value)(start(), sharding.shard_batch(BATCH, mesh))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), got, expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [({"features": None, "pixels": None}, "neither"), ({"pool_scales": [1, 4]}, "pool_scales: got 4")],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(values, message):
    with pytest.raises(UserError, match=message):
        tokenizer.make(MODEL, settings_of(**values))


def test_a_codebook_from_data_has_to_train():
    frozen = {"image_tokenizer": {"encoder": {"kernel": 0.0}}}
    settings = settings_of(codebook_from_data=True)
    with pytest.raises(UserError, match="settings.codebook_from_data: got True, and .*/table does not train"):
        tokenizer.first_parameters(MODEL, settings, frozen, {}, None, None)
