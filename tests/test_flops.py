"""Counted operations against those that XLA counts in the unoptimised program."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from blip3o_jax import flops
from blip3o_jax.config import EditConfig, schema
from blip3o_jax.config.presets import preset
from blip3o_jax.models import blip3o
from blip3o_jax.objectives import autoencoder, grpo

MODEL = schema.with_dtype(preset("mid"), dtype="float32", param_dtype="float32", unroll=True)
MODEL = dataclasses.replace(
    MODEL, decoder=dataclasses.replace(MODEL.decoder, depth=2), dit=dataclasses.replace(MODEL.dit, depth=2)
)
SHAPES = blip3o.abstract_plain(MODEL)


def counted(part: str, method: str, *inputs) -> float:
    run = jax.jit(lambda params, *inputs: blip3o.apply(MODEL, params, part, method, *inputs))
    return run.lower(SHAPES, *inputs).cost_analysis()["flops"]


def shaped(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def test_operations_of_the_diffusion_transformer():
    """XLA counts norms and softmax, too. Small pictures: a loop over chunks of queries would count once."""
    condition = shaped(1, 65, MODEL.dit.caption_channels)
    encoded = jax.eval_shape(lambda p, c: blip3o.apply(MODEL, p, "dit", "encode_condition", c), SHAPES, condition)
    encode, denoise = flops.dit(MODEL, 8 * 8, 65)
    assert counted("dit", "encode_condition", condition) == pytest.approx(encode, rel=0.02)
    assert counted("dit", "__call__", shaped(1, 8, 8, 32), shaped(1), (encoded,)) == pytest.approx(denoise, rel=0.05)


def test_operations_of_the_decoder():
    """XLA counts the masked half of the attention, too."""
    length, config = 64, MODEL.decoder
    masked_half = config.depth * 2.0 * length**2 * config.num_heads * config.head_dim
    inputs = shaped(1, length, config.width), shaped(1, length, dtype=jnp.int32), shaped(1, length, dtype=bool)
    ours = flops.decoder(config, length) + masked_half
    assert counted("decoder", "__call__", *inputs) == pytest.approx(ours, rel=0.03)


def test_every_noise_level_counts_and_frozen_parts_cost_their_forward():
    layout = types.SimpleNamespace(length=100, max_references=0, fields=("target_codes", "target_latent"))
    cells, states = MODEL.latent_size**2, 1 + MODEL.num_image_tokens
    decoder = flops.decoder(MODEL.decoder, 100) + flops.head(MODEL.decoder, 100)
    encode, denoise = flops.dit(MODEL, cells, states)

    def step(*parts: str, **options) -> float:
        return flops.training_step(MODEL, layout, 8, {name: SHAPES[name] for name in parts}, **options)

    assert step("decoder", "dit") == pytest.approx(8 * 3 * (decoder + encode + denoise))
    assert step("dit", flow_draws=3) == pytest.approx(8 * (decoder + 3 * (encode + 3 * denoise)))
    assert step("connector") == pytest.approx(8 * (decoder + 2 * (encode + denoise)))
    assert step("decoder", flow_every=4) == pytest.approx(8 * (3 * decoder + 2 * (encode + denoise) / 4))


def test_every_encoder_counts_the_images_it_reads():
    fields = ("target_codes", "target_latent", "ref_tokenizer_pixels", "ref_pixels")
    model = dataclasses.replace(MODEL, edit=EditConfig(siglip_features=True, vae_noise=True))

    def step(*fields: str) -> float:
        return flops.training_step(model, types.SimpleNamespace(
            length=100, max_references=3, fields=fields, height=64, width=64), 1, {})  # fmt: skip

    encoders = 3 * flops.image_tokenizer(model) + flops.autoencoder(model, "encode", 64, 64)
    assert step(*fields) - step() == pytest.approx(encoders)


@pytest.mark.parametrize(
    ("halves", "passes"),
    [(("encoder", "decoder"), (3, 3)), (("decoder",), (1, 3)), (("encoder",), (3, 2))],
)
def test_a_half_of_the_autoencoder_that_trains_passes_gradients_back_through_itself(halves, passes):
    layout = types.SimpleNamespace(height=64, width=64)
    cost = [flops.autoencoder(MODEL, name, 64, 64) for name in ("encode", "decode")]
    counted = autoencoder.flops_per_step(MODEL, None, layout, 2, {"autoencoder": dict.fromkeys(halves, {})})
    assert counted == pytest.approx(2 * sum(times * each for times, each in zip(passes, cost, strict=True)))


def test_the_unconditional_half_of_a_policy_costs_no_pass_of_an_update():
    model = dataclasses.replace(MODEL, token_guidance_scale=2.0)
    layout = types.SimpleNamespace(length=96, max_references=0)
    forward = 8 * (flops.decoder(model.decoder, 96) + flops.image_head(model))
    assert grpo.flops_per_step(model, grpo.Settings(), layout, 8, {}) == 3 * forward
