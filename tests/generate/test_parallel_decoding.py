"""Decoding several tokens in a pass: the same tokens, log-probabilities and hidden states, in fewer passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from blip3o_jax import Pipeline
from blip3o_jax.config.presets import preset
from blip3o_jax.errors import UserError
from blip3o_jax.generate import ar, prompts
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.generate.window import Decoding
from blip3o_jax.models import blip3o
from blip3o_jax.nn import few_rows, kernels
from blip3o_jax.sharding import make_mesh

TINY = preset("tiny")
TOKENS = TINY.num_image_tokens
SAMPLINGS = {
    "greedy": ar.TokenSampling(temperature=0),
    "truncated": ar.TokenSampling(0.8, 20, 0.7),
    "all ids": ar.TokenSampling(1.0, 0, 1.0, image_ids_only=False),
    "nearly certain": ar.TokenSampling(0.2, 0, 1.0),
}
FAST = {"num_inference_steps": 1, "top_k": 20, "token_decoding": "parallel"}
start = jax.jit(ar.start, static_argnums=(0, 5, 6, 8))
advance = jax.jit(ar.advance, static_argnums=(0, 3))


@pytest.fixture(scope="module")
def params():
    return {"decoder": blip3o.init(TINY, jax.random.key(0))["decoder"]}


def decode(params, sampling, window, seed=0, guided=False, rows=4, stops=(TOKENS,)) -> ar.Decoding:
    """Of two random prompts of different lengths, rows / 2 samples each."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 300, (4 if guided else 2, 9)).astype(np.int32)
    valid = np.arange(9) >= rng.integers(0, 6, (len(ids), 1))
    x = blip3o.apply(TINY, params, "decoder", "embed_tokens", ids)
    scale = jnp.asarray(rng.uniform(-0.5, 3, rows), jnp.float32) if guided else None
    keys = jax.random.split(jax.random.key(seed), rows)
    decoding = start(TINY, params, x, valid, keys, sampling, TOKENS, scale, window)
    for stop in stops:
        decoding = advance(TINY, params, decoding, sampling, jnp.int32(stop))
    return decoding


def assert_equal(got: ar.Decoding, expected: ar.Decoding) -> None:
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_allclose(got.log_probs, expected.log_probs, atol=1e-5)
    np.testing.assert_allclose(got.hidden, expected.hidden, atol=1e-4)


@pytest.mark.parametrize(
    ("sampling", "guided", "window"),
    [
        ("greedy", False, TOKENS),
        ("greedy", True, 5),
        ("truncated", False, 2),
        ("truncated", True, 5),
        ("all ids", True, TOKENS),
        ("nearly certain", False, 5),
    ],
)
def test_a_window_changes_nothing_but_the_passes(params, sampling, guided, window):
    sampling = SAMPLINGS[sampling]
    for seed in range(2):
        got, expected = decode(params, sampling, window, seed, guided), decode(params, sampling, 1, seed, guided)
        assert_equal(got, expected)
        assert (np.asarray(expected.passes) == TOKENS).all()
        assert (np.asarray(got.passes) <= TOKENS).all() and (np.asarray(got.passes) >= -(-TOKENS // window)).all()


def test_rows_are_read_and_written_on_a_tpu_as_elsewhere(params):
    expected = decode(params, SAMPLINGS["truncated"], 5, guided=True)
    with kernels.forced_branch("tpu"):
        got = decode(params, SAMPLINGS["truncated"], 5, guided=True)
    assert_equal(got, expected)
    np.testing.assert_array_equal(got.passes, expected.passes)


def test_right_guesses_save_passes(params):
    sampling = ar.TokenSampling(temperature=0)
    flat = jax.tree.map(jnp.zeros_like, params)  # every score is 0: the first id always, as guessed
    assert (np.asarray(decode(flat, sampling, 4).passes) == TOKENS // 4).all()
    hot = decode(params, ar.TokenSampling(1e4, 0, 1.0), 4)  # the noise of a position alone decides, whatever is guessed
    assert TOKENS // 4 < hot.passes.max() < TOKENS


def test_stretches_change_nothing(params):
    whole = decode(params, SAMPLINGS["truncated"], 4)
    cut = decode(params, SAMPLINGS["truncated"], 4, stops=(1, 2, 7, 7, TOKENS))
    for name in ("tokens", "log_probs", "hidden", "passes", "step"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(cut, name))


def test_a_stretch_ends_with_every_row_at_its_stop(params):
    sampling = SAMPLINGS["nearly certain"]
    part, whole = decode(params, sampling, 4, stops=(5,)), decode(params, sampling, 1)
    steps = np.asarray(part.step)
    assert steps.min() >= 5
    for row, step in enumerate(steps):
        np.testing.assert_array_equal(part.tokens[row, :step], whole.tokens[row, :step])
        np.testing.assert_allclose(part.hidden[row, : 1 + step], whole.hidden[row, : 1 + step], atol=1e-4)


def test_passes_of_a_row_do_not_depend_on_the_others(params):
    sampling = SAMPLINGS["greedy"]
    both, one = decode(params, sampling, 4, rows=4), decode(params, sampling, 4, rows=2)
    np.testing.assert_array_equal(both.passes[::2], one.passes)
    assert one.passes[0] != one.passes[1]  # rows that are done wait for the others


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray((np.arange(48 * 64 * 3) % 251).astype(np.uint8).reshape(48, 64, 3))


@pytest.mark.parametrize("shape", [None, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}], ids=str)
def test_prompts_with_references_on_any_mesh(golden_root, photo, shape, monkeypatch):
    monkeypatch.setattr(prompts, "BUCKET", 256)
    mesh = None if shape is None else make_mesh(shape)
    asked = [Prompt("t2i", "a cat"), Prompt("edit", "make it blue", (photo,)), Prompt("t2i", "two dogs and a tree")]
    settings = {**FAST, "num_images_per_prompt": 3, "token_guidance_scale": 1.5, "batch_size": 9}
    load = functools.partial(Pipeline.from_pretrained, golden_root / "edit_both" / "checkpoint", "float32")
    expected = load().answer(asked, **settings | {"token_decoding": "sequential"})
    got = load(mesh=mesh).answer(asked, **settings, token_window=5)
    np.testing.assert_array_equal(got.token_ids, expected.token_ids)
    np.testing.assert_allclose(got.log_probs, expected.log_probs, atol=1e-4)
    assert set(expected.token_passes) == {TOKENS} and got.token_passes.max() < TOKENS
    for mine, theirs in zip(got.images, expected.images, strict=True):
        assert np.abs(np.asarray(mine, np.int32) - np.asarray(theirs, np.int32)).max() <= 2


def test_passes_are_recorded_with_every_image(golden_root):
    pipeline = Pipeline.from_pretrained(golden_root / "t2i" / "checkpoint", "float32")
    output = pipeline(["a cat", "two dogs", "fog"], batch_size=2, **FAST, token_window=TOKENS)
    assert output.token_passes.shape == (3,) and output.token_passes.dtype == np.int32
    assert output.token_passes.min() >= 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"token_decoding": "fast"}, "token_decoding: got 'fast' - expected auto . parallel . sequential"),
        ({"token_decoding": None}, "token_decoding: not set"),
        ({"token_window": 1}, "token_window: got 1 - expected 2 to"),
        ({"token_window": 4.0}, "token_window: got 4.0 - expected int"),
        ({"token_window": TOKENS + 1}, f"token_window: got {TOKENS + 1} - expected at most the {TOKENS} tokens"),
        ({"token_decoding": "sequential", "token_window": 4}, "token_window: got 4 for sequential decoding"),
    ],
)
def test_a_window_that_does_not_fit_is_refused_before_anything_is_computed(golden_root, values, words):
    pipeline = Pipeline.from_pretrained(golden_root / "t2i" / "checkpoint", "float32")
    with pytest.raises(UserError, match=words):
        pipeline("a cat", progress=lambda *_: pytest.fail("computed"), **values)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_the_method_decides_and_then_the_rows(platform):
    for rows in (1, 2, 16, 17, 64, 4096):
        sizes = [Decoding(method).size(rows, 64, platform) for method in ("sequential", "auto", "parallel")]
        assert sizes[0] == 1 <= sizes[1] <= sizes[2] and 2 <= sizes[2] <= 64
        assert Decoding(window=7).size(rows, 64, platform) == 7
        assert platform != "gpu" or rows > few_rows.ROWS or rows * sizes[1] <= few_rows.ROWS  # its kernels take these
    assert Decoding().size(2, 64, platform) > 1 == Decoding().size(4096, 64, platform)
    assert Decoding("parallel").size(2, 3, platform) <= 3
    assert (Decoding().size(2, 64, platform, temperature=3.0) == 1) == (platform == "cpu")
    assert Decoding("parallel").size(2, 64, platform, temperature=3.0) > 1


def test_windows_are_as_large_as_their_limits_allow():
    def sizes(platform, *rows):
        return [Decoding().size(number, 64, platform) for number in rows]

    assert min(sizes("cpu", 1, 8)) > 1 == sizes("cpu", 9)[0]
    assert sizes("tpu", 1, 16, 17, 64, 256) == [16, 16, 15, 4, 1]  # 16 tokens of a row, 256 of a pass
    assert sizes("gpu", 1, 2, 4, 16, 17, 64) == [8, 8, 4, 1, 15, 4]  # 16 of a pass that the kernels of few rows take
