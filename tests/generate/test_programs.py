"""The compiled programs of generation: what they hold, and how a mesh shares it."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from blip3o_jax.config import EditConfig
from blip3o_jax.config.presets import preset
from blip3o_jax.generate import ar, matching, paint, scoring, stages, stochastic
from blip3o_jax.generate.prompts import PromptRows
from blip3o_jax.models import blip3o
from blip3o_jax.plan import program
from blip3o_jax.sharding import batch_shape, make_mesh, sharded_shapes, shardings_of, use_mesh

TINY = preset("tiny")


@pytest.fixture(scope="module")
def params():
    return blip3o.init(TINY, jax.random.key(0))


@pytest.mark.parametrize(("images", "together"), [(0.5, 1), (2, 2), (3, 2), (100, 4)])
def test_images_are_decoded_and_encoded_a_megapixel_at_a_time(params, monkeypatch, images, together):
    monkeypatch.setattr(stages, "MEGAPIXEL", int(images * (2 * TINY.autoencoder.spatial_factor) ** 2))
    latent = jax.random.normal(jax.random.key(1), (4, 2, 2, TINY.autoencoder.latent_channels))
    expected = blip3o.decode_latent(TINY, params, latent)
    rows, plain = {"decode_scaled": set(), "encode_scaled": set()}, blip3o.apply
    monkeypatch.setattr(blip3o, "apply", lambda *args: rows[args[3]].add(len(args[4])) or plain(*args))
    pixels = stages.decode_latent.__wrapped__(TINY, params, latent)
    np.testing.assert_allclose(pixels, expected, atol=1e-5)
    assert stages.encode_latent.__wrapped__(TINY, params, pixels).shape == latent.shape
    assert rows == {"decode_scaled": {together}, "encode_scaled": {together}}


def test_features_are_those_of_the_references_and_of_models_that_use_them(params):
    model, side = dataclasses.replace(TINY, edit=EditConfig(siglip_features=True)), TINY.image_tokenizer.image_size
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, side, side, 3)).astype(np.float32)
    codebook = stages.codebook(model, params)
    codes, features = stages.encode_images(model, params, pixels, codebook)
    expected, others = blip3o.encode_tokens(model, params, pixels[:, 1:], codebook)
    np.testing.assert_array_equal(codes[:, 1:], expected)
    np.testing.assert_allclose(features, others, atol=1e-4)
    assert stages.encode_images(model, params, pixels[:, :1], codebook)[1] is None
    assert stages.encode_images(TINY, params, pixels, codebook)[1] is None


def test_the_backward_pass_of_log_probs_holds_the_scores_of_one_chunk():
    hidden, head, tokens = np.zeros((2, 12, 4), np.float32), np.zeros((50, 4), np.float32), np.zeros((2, 12), int)

    def total(hidden, head):
        return scoring.token_log_probs(hidden, head, tokens, ar.TokenSampling(top_k=0, top_p=1.0), 3)[0].sum()

    program = str(jax.make_jaxpr(jax.grad(total, (0, 1)))(hidden, head))
    assert "f32[2,3,50]" in program and "f32[4,2,3,50]" not in program


def test_the_backward_pass_of_velocities_holds_the_states_of_one_noise_level(params):
    hidden, noise = np.zeros((2, 1 + TINY.num_image_tokens, 64), np.float32), np.zeros((2, 5, 2, 2, 32), np.float32)
    points = matching.Noised(noise, np.zeros((2, 5), np.float32), noise)

    def total(params):
        return matching.velocities(TINY, params, hidden, None, None, points).sum()

    program = str(jax.make_jaxpr(jax.grad(total))({name: params[name] for name in ("dit", "connector")}))
    states = f"2,4,{TINY.dit.width}]"
    assert f"f32[{states}" in program and f"f32[5,{states}" not in program


def test_loops_reuse_the_memory_of_their_state(params):
    hidden, keys = np.zeros((2, 1 + TINY.num_image_tokens, 64), np.float32), jax.random.split(jax.random.key(0), 2)
    settings, sampling = paint.Denoising(2), ar.TokenSampling()
    canvas = stages.start_canvas.eval_shape(TINY, params, hidden, keys, settings, (8, 8), None, None)
    text = np.zeros((2, 64), np.int32)
    rows = PromptRows(text, text > 0, text - 1, np.zeros((2, 1, TINY.num_image_tokens), np.int32))
    decoding = stages.prefill.eval_shape(TINY, params, rows, keys, np.int32(0), sampling)
    loops = (stages.advance_canvas, canvas, settings), (stages.advance_tokens, decoding, sampling)
    for loop, state, how in loops:
        lowered = loop.lower(TINY, params, state, how, np.int32(2)).as_text()
        assert re.search("tf.aliasing_output|jax.buffer_donor", lowered)


def test_the_decoding_loop_does_not_gather_weights(params):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    shardings = shardings_of(blip3o.abstract_params(TINY)["decoder"], mesh)
    stored = shardings["layers"]["mlp"]["up"]["kernel"].spec
    assert stored == PartitionSpec(None, "fsdp", "tensor")
    x, valid = np.zeros((4, 8, TINY.decoder.width), np.float32), np.ones((4, 8), bool)
    with use_mesh(mesh):
        decoder = {"decoder": jax.device_put(params["decoder"], shardings)}
        start = jax.jit(ar.start, static_argnums=(0, 5, 6))
        keys = jax.random.split(jax.random.key(0), 4)
        weights = start(TINY, decoder, x, valid, keys, ar.TokenSampling(), TINY.num_image_tokens).weights
    for layer in weights.layers:
        assert layer["mlp"]["up"]["kernel"].sharding.spec == PartitionSpec(None, "tensor")
        assert layer["mlp"]["down"]["kernel"].sharding.spec in (PartitionSpec("tensor"), PartitionSpec("tensor", None))
    assert "fsdp" not in weights.head.sharding.spec


@pytest.mark.parametrize("part", ["encode_latent", "decode_latent", "encode_tokens"])
def test_devices_gather_weights_once_for_all_images_that_follow_one_another(part):
    mesh, config = make_mesh({"fsdp": 4}, jax.devices()[:4]), TINY
    side, factor = config.image_tokenizer.image_size, config.autoencoder.spatial_factor
    shape = {
        "encode_latent": (2 * factor, 2 * factor, 3),
        "decode_latent": (2, 2, config.autoencoder.latent_channels),
        "encode_tokens": (side, side, 3),
    }[part]

    def exchanged(rows):
        encode = jax.jit(lambda params, x: getattr(blip3o, part)(config, params, x, at_a_time=1))
        with use_mesh(mesh):
            lowered = encode.lower(
                sharded_shapes(blip3o.abstract_params(config), mesh), batch_shape((rows, *shape), np.float32, mesh)
            )
        found = program.read(lowered.compile(), mesh).collectives
        return sum(each.bytes for each in found)

    few, many = exchanged(8), exchanged(32)
    assert 0 < few and many < 1.2 * few


@pytest.mark.parametrize("stochastically", [False, True])
def test_devices_gather_weights_once_for_all_denoising_steps(stochastically):
    mesh, config, size = make_mesh({"fsdp": 4}, jax.devices()[:4]), TINY, (TINY.image_size, TINY.image_size)

    def denoised(steps, params, hidden):
        keys = jax.random.split(jax.random.key(0), len(hidden))
        if stochastically:
            settings = stochastic.StochasticDenoising(steps, guidance_scale=1)
            return stochastic.sample(config, params, hidden, None, None, keys, settings, size)
        settings = paint.Denoising(steps)
        canvas = paint.start(config, params, hidden, paint.noise(config, keys, *size), keys, settings, None, None)
        return paint.advance(config, params, canvas, settings, steps)

    def exchanged(steps):
        hidden = batch_shape((8, 1 + config.num_image_tokens, config.decoder.width), np.float32, mesh)
        params = sharded_shapes(blip3o.abstract_params(config), mesh)
        with use_mesh(mesh):
            compiled = jax.jit(denoised, static_argnums=0).lower(steps, params, hidden).compile()
        return sum(each.bytes for each in program.read(compiled, mesh).collectives)

    few, many = exchanged(2), exchanged(8)
    assert 0 < few and many < 1.2 * few
