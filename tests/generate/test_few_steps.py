"""How a distilled checkpoint is sampled: its own steps and guidance, and what it says to others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from blip3o_jax.config import MeanFlowConfig
from blip3o_jax.config.presets import preset
from blip3o_jax.convert.checkpoint import open_checkpoint
from blip3o_jax.errors import UserError
from blip3o_jax.generate import paint
from blip3o_jax.generate.engine import Engine, Runner
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.generate.settings import Requests, check_requests, completed, make_settings, unsuitable
from blip3o_jax.models import blip3o
from blip3o_jax.text.tokenizer import Tokenizer
from support.small import params_of

PLAIN = preset("tiny")
MODEL = dataclasses.replace(PLAIN, dit=dataclasses.replace(PLAIN.dit, mean_flow=MeanFlowConfig(4, 3.0)))


def requests_of(settings):
    return Requests(settings, (0, 0), (), None)


@pytest.mark.parametrize(
    ("model", "given", "steps", "scale"),
    [(PLAIN, {}, 30, 2.0), (PLAIN, {"guidance_scale": 5.0, "num_inference_steps": 7}, 7, 5.0), (MODEL, {}, 4, 3.0),
     (dataclasses.replace(PLAIN, num_inference_steps=8, guidance_scale=1.0), {}, 8, 1.0),
     (MODEL, {"num_inference_steps": 1}, 1, 3.0), (MODEL, {"guidance_scale": 3.0}, 4, 3.0),
     (MODEL, {"sampler": "examples.sampler:adams_bashforth"}, 4, 3.0)],
)  # fmt: skip
def test_what_is_left_open_is_the_checkpoints(model, given, steps, scale):
    settings = completed(model, make_settings(**given))
    assert (settings.num_inference_steps, settings.guidance_scale) == (steps, scale)
    assert completed(model, settings) == settings
    assert unsuitable(model, requests_of(settings)) is None


@pytest.mark.parametrize(
    ("given", "line"),
    [({"num_inference_steps": 5}, "distilled to at most 4 steps"), ({"sampler": "heun"}, "distilled for .* euler")],
)
def test_what_it_was_not_made_for_is_said(given, line):
    assert line.split(" .* ")[0] in unsuitable(MODEL, requests_of(completed(MODEL, make_settings(**given))))
    assert unsuitable(PLAIN, requests_of(completed(PLAIN, make_settings(**given)))) is None


@pytest.mark.parametrize(
    ("task", "given", "guided"),
    [("t2i", {}, True), ("t2i", {"guidance_scale": 1.0}, False), ("edit", {"guidance_scale": 1.0}, True),
     ("t2i", {"guidance_scale": 1.0, "token_guidance_scale": 2.0}, True)],
)  # fmt: skip
@pytest.mark.parametrize("distilled", [False, True])
def test_a_negative_prompt_that_guides_nothing_is_said(golden_root, task, given, guided, distilled):
    opened = open_checkpoint(golden_root / "t2i" / "checkpoint")
    config = dataclasses.replace(opened.config, edit_token_guidance_scale=2.0)
    if distilled:
        config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, mean_flow=MeanFlowConfig(4, 1.0)))
        guided = guided and (task == "edit" or "token_guidance_scale" in given)
    prompt = Prompt(task, "a star", (Image.new("RGB", (4, 4)),) if task == "edit" else ())
    settings = make_settings(negative_prompt="a moon", **given)
    line = unsuitable(
        config, check_requests(config, Tokenizer.from_directory(opened.tokenizer_dir), [prompt], settings)
    )
    scales = "token_guidance_scale is 1" if distilled else "guidance_scale and token_guidance_scale are 1"
    assert line == (None if guided else f"negative_prompt has no effect: {scales}")


@pytest.mark.parametrize("scale", [2.0, 1.0])
def test_another_guidance_than_the_distilled_one_is_refused(scale):
    with pytest.raises(
        UserError, match=f"guidance_scale: got {scale} - expected 3, which is distilled .* leave it out"
    ):
        completed(MODEL, make_settings(guidance_scale=scale))


def test_a_step_is_the_mean_velocity_in_one_evaluation_without_guidance():
    make = blip3o.initializers(MODEL)
    params = {part: params_of(make[part]) for part in ("dit", "connector")}
    engine = Engine(MODEL, params, Runner(), (16, 16))
    hidden = np.random.default_rng(0).normal(size=(2, 1 + MODEL.num_image_tokens, 64)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    one, two = (np.asarray(engine.paint(hidden, keys, paint.Denoising(n), 3.0)) for n in (1, 2))
    assert np.asarray(engine.paint(hidden, keys, paint.Denoising(1), 1.0)).tolist() == one.tolist()
    noise = np.asarray(paint.noise(MODEL, jax.vmap(jax.random.fold_in, (0, None))(keys, 1), 16, 16))
    condition = blip3o.make_condition(MODEL, params, jnp.asarray(hidden))

    def mean_velocity(x, sigma, until):
        return blip3o.velocity(MODEL, params, x, jnp.float32(sigma), condition, until=jnp.float32(until))

    np.testing.assert_allclose(one, noise - mean_velocity(noise, 1, 0), rtol=1e-4, atol=1e-4)
    middle = noise - 0.5 * mean_velocity(noise, 1, 0.5)
    np.testing.assert_allclose(two, middle - 0.5 * mean_velocity(middle, 0.5, 0), rtol=1e-4, atol=1e-4)
    assert np.abs(mean_velocity(noise, 1, 0) - mean_velocity(noise, 1, 1)).max() > 0.01
