"""The engine between prompts and pixels: which programs it runs, with what, and in how many pieces."""

import dataclasses
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.config import EditConfig
from blip3o_jax.config.presets import preset
from blip3o_jax.generate import ar, paint, stages
from blip3o_jax.generate.engine import Engine, Runner, scope
from blip3o_jax.generate.prompts import PromptArrays
from blip3o_jax.models import blip3o
from blip3o_jax.sharding import make_mesh
from support.small import params_of

TINY = preset("tiny")
KEYS = np.zeros(6)


class Asked(Exception):
    """What a part of the engine was asked for."""


class Asking:
    """Stands in for the settings of decoding."""

    def size(self, *asked):
        raise Asked(*asked)


@pytest.mark.parametrize(("scale", "devices", "rows"), [(None, 1, 6), (np.ones(2), 1, 12), (np.ones(2), 8, 2)])
def test_the_window_is_chosen_for_the_rows_of_a_pass_on_one_device(scale, devices, rows):
    engine = Engine(TINY, {}, Runner(None if devices == 1 else make_mesh({"data": devices})), (8, 8), decoding=Asking())
    with pytest.raises(Asked) as asked:
        engine.decode(types.SimpleNamespace(token_guidance_scale=scale), KEYS, ar.TokenSampling(temperature=0.5))
    assert asked.value.args == (rows, TINY.num_image_tokens, "cpu", 0.5)


@pytest.mark.parametrize(("scale", "passed"), [(1, None), (1.0, None), (2.5, 2.5), (0.0, 0.0), (-1.0, -1.0)])
def test_guidance_one_has_no_unconditional_half(scale, passed):
    def run(stage, program, config, params, hidden, keys, settings, size, reference, guidance_scale, negative):
        raise Asked(guidance_scale)

    run.mesh = None
    with pytest.raises(Asked) as asked:
        Engine(TINY, {}, run, (8, 8)).paint(np.zeros(1), KEYS, paint.Denoising(2), scale)
    assert asked.value.args == (passed,)


def test_what_depends_on_the_parameters_alone_is_computed_once():
    made = []

    def run(stage, program, *inputs):
        made.append(program)
        return len(made)

    run.mesh = None
    engine = Engine(TINY, {}, run, (8, 8))
    assert [engine.codebook(), engine.codebook()] == [1, 1] and made == [stages.codebook]


@pytest.mark.parametrize(
    ("references", "programs"), [(0, []), (2, [stages.codebook, stages.encode_images, stages.encode_latent])]
)
def test_prompts_without_references_encode_nothing(references, programs):
    model, made = dataclasses.replace(TINY, edit=EditConfig(vae_condition=True)), []

    def run(stage, program, *inputs):
        made.append(program)
        return None, None

    run.mesh, run.put = None, np.asarray
    rows = {name: np.zeros((3, 64), np.int32) for name in ("tokens", "valid", "image_slot")}
    pixels = {"tokenizer_pixels": np.zeros((3, 1 + references, 4, 4, 3)), "ref_pixels": np.zeros((3, 8, 8, 3))}
    arrays = PromptArrays(
        **rows, **pixels, window_start=None, has_ref=np.zeros(3, bool), has_image=references > 0,
        token_guidance_scale=None,
    )  # fmt: skip
    Engine(model, {}, run, (8, 8)).read(arrays)
    assert made == programs


def test_a_mesh_says_for_which_platform_it_compiles_and_shares_the_rows_of_host_arrays():
    mesh = types.SimpleNamespace(devices=np.array([[types.SimpleNamespace(platform="tpu")]]))
    assert (Runner(mesh).platform, Runner().platform) == ("tpu", "cpu")
    rows = Runner(make_mesh({"data": 8})).put(np.arange(16).reshape(8, 2))
    assert [shard.data.tolist() for shard in rows.addressable_shards] == [[[i, i + 1]] for i in range(0, 16, 2)]


def test_seconds_of_a_stage_add_up():
    run = Runner(make_mesh({"data": 8}))  # compiles nothing
    for _ in range(3):
        run("a", time.sleep, 0.01)
    run("b", time.sleep, 0.0)
    assert run.seconds["a"] >= 0.03 and run.seconds.keys() == {"a", "b"}


@pytest.mark.parametrize(("dtype", "expected"), [("float32", True), ("bfloat16", False)])
def test_float32_models_multiply_in_float32_on_any_device(dtype, expected):
    with scope(None, dtype):
        text = jax.jit(jnp.matmul).lower(np.eye(2), np.eye(2)).as_text()
    assert ("HIGHEST" in text) == expected


def test_denoising_in_pieces_carries_the_state_of_the_sampler():
    params = {part: params_of(blip3o.initializers(TINY)[part]) for part in ("dit", "connector")}
    hidden = np.random.default_rng(0).normal(size=(2, 1 + TINY.num_image_tokens, TINY.decoder.width))
    keys, settings, said = jax.random.split(jax.random.key(0), 2), paint.Denoising(4, "dpmpp_2m"), []
    whole, pieces = (
        Engine(TINY, params, Runner(progress=progress), (8, 8)).paint(hidden.astype(np.float32), keys, settings, 1.0)
        for progress in (None, lambda *progress: said.append(progress))
    )
    np.testing.assert_allclose(pieces, whole, atol=1e-5)
    assert said == [("denoise", step, 4) for step in (1, 2, 3, 4)]


def test_every_key_is_used_once():
    streams = stages.TOKEN_STREAM, stages.NOISE_STREAM, stages.NEGATIVE_STREAM, stages.STEP_STREAM
    keys = stages.image_keys([3, 4], range(2), [0, 5])
    drawn = [jax.random.key_data(stages.stream_of(keys, stream)) for stream in (*streams, stages.MATCHING_STREAM)]
    assert len(np.unique(np.concatenate(drawn), axis=0)) == 5 * 4
    alone = stages.image_keys([4], [6])  # sample 1 of the second prompt, whose samples start at 5
    np.testing.assert_array_equal(jax.random.key_data(alone[0]), jax.random.key_data(keys[3]))
