"""Conditions of denoising: the unconditional half is the one that it stands for, vector by vector."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.config import EditConfig
from blip3o_jax.config.presets import preset
from blip3o_jax.generate import paint
from blip3o_jax.models import blip3o
from support.small import jit, params_of

MODEL = dataclasses.replace(preset("tiny"), edit=EditConfig(vae_condition=True))
STATES, REFERENCE = 1 + MODEL.num_image_tokens, 4  # vectors of an image span and of a reference


def test_a_backbone_without_stacked_blocks_keeps_its_layout_on_a_gpu():
    params = {"dit": {"layers": {"kernel": np.zeros((2, 3))}}}
    assert paint.laid_out(MODEL, params, types.SimpleNamespace(platform="gpu")) is params


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("reference", [0, REFERENCE])
def test_the_unconditional_half_equals_all_of_its_vectors_one_by_one(negative, reference):
    make, rng = blip3o.initializers(MODEL), np.random.default_rng(0)
    params = {part: params_of(make[part]) for part in ("dit", "connector")}
    params["connector"] = jax.tree.map(lambda leaf: leaf + 0.1, params["connector"])  # of zeros, it is not zero
    states = rng.normal(size=(2, STATES, MODEL.decoder.width)).astype(np.float32) if negative else None
    x = rng.normal(size=(2, 2, 2, MODEL.dit.in_channels)).astype(np.float32)

    @jit
    def velocities(params):
        condition = paint.unconditional(MODEL, params, STATES + reference, states)
        zeros = jnp.zeros((2, STATES, MODEL.decoder.width))
        every = blip3o.apply(MODEL, params, "connector", "__call__", states if negative else zeros)
        every = jnp.pad(every, ((0, 0), (0, reference), (0, 0)))  # null references are zeros
        every = paint.encode(MODEL, params, every)
        return [blip3o.velocity(MODEL, params, x, jnp.full(2, 0.5), (each,)) for each in (condition, every)]

    np.testing.assert_allclose(*velocities(params), atol=1e-5)
