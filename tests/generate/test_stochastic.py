"""Stochastic denoising: the flow that it perturbs, its noise, and what its gradient passes through."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax import treepath
from blip3o_jax.config import EditConfig
from blip3o_jax.config.presets import preset
from blip3o_jax.generate import paint, stochastic
from blip3o_jax.generate.engine import Engine, Runner
from blip3o_jax.generate.prompts import Reference
from blip3o_jax.generate.stochastic import StochasticDenoising
from blip3o_jax.models import blip3o
from support.small import jit, params_of

MODEL = dataclasses.replace(preset("tiny"), edit=EditConfig(vae_condition=True, vae_noise=True))
SIZE = 8, 16
LATENT = tuple(side // MODEL.autoencoder.spatial_factor for side in SIZE) + (MODEL.autoencoder.latent_channels,)
KEYS = jax.random.split(jax.random.key(0), 2)
HAS_REF = np.array([True, False])
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(2, 1 + MODEL.num_image_tokens, MODEL.decoder.width)).astype(np.float32)
REF_LATENT = RNG.normal(size=(2, *LATENT)).astype(np.float32)  # the second belongs to no reference


@pytest.fixture(scope="module")
def params():
    make = blip3o.initializers(MODEL)
    return {part: params_of(make[part]) for part in ("dit", "connector", "vae_connector")}


def sample(params, settings, rows=slice(None)):
    inputs = HIDDEN[rows], REF_LATENT[rows], HAS_REF[rows], KEYS[rows]
    return stochastic.sample(MODEL, params, *inputs, settings, SIZE)


def test_a_path_with_hardly_any_noise_is_that_of_the_deterministic_sampler(params):
    path, _ = sample(params, StochasticDenoising(3, noise_level=1e-6, guidance_scale=0.5))
    engine, reference = Engine(MODEL, params, Runner(), SIZE), Reference(jnp.asarray(REF_LATENT), jnp.asarray(HAS_REF))
    expected = engine.paint(HIDDEN, KEYS, paint.Denoising(3), 0.5, reference)
    np.testing.assert_allclose(path[:, -1], expected, atol=1e-4)


def test_every_step_of_every_row_has_noise_of_its_own(params):
    settings = StochasticDenoising(3, guidance_scale=1.0)
    path, _ = sample(params, settings)
    transition = stochastic.transitions(MODEL, params, HIDDEN, REF_LATENT, HAS_REF, settings)
    noise = [path[:, 0]]
    for step in range(3):
        there = jax.jit(transition)(path[:, step], jnp.int32(step))
        noise.append((path[:, step + 1] - there.mean) / there.std)
    flat = np.concatenate([np.asarray(each).reshape(2, -1) for each in noise])
    np.testing.assert_allclose(np.corrcoef(flat), np.eye(8), atol=0.3)
    np.testing.assert_allclose(flat.std(axis=1), 1, atol=0.2)
    alone, _ = sample(params, settings, slice(1, 2))
    np.testing.assert_allclose(alone[0], path[1], atol=1e-5)


def test_the_unconditional_half_is_a_constant_of_the_gradient(params):
    x, weights = RNG.normal(size=(2, 2, *LATENT)).astype(np.float32)

    def mean(params, scale):
        settings = StochasticDenoising(3, guidance_scale=scale)
        transition = stochastic.transitions(MODEL, params, HIDDEN, REF_LATENT, HAS_REF, settings)
        return (transition(x, jnp.int32(1)).mean * weights).sum()

    guided, plain = (treepath.flatten(jit(jax.grad(mean), static_argnums=1)(params, scale)) for scale in (2.5, 1.0))
    largest = max(np.abs(leaf).max() for leaf in plain.values())
    assert largest > 0
    for path, leaf in guided.items():  # the mean is linear in the velocity
        np.testing.assert_allclose(leaf, 2.5 * plain[path], atol=1e-5 * largest, err_msg=path)
