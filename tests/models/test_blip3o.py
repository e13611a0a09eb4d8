"""Which states condition the diffusion backbone, and how it is called."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.config import MeanFlowConfig
from blip3o_jax.config.presets import preset
from blip3o_jax.models import blip3o

TINY = preset("tiny")
MODEL = dataclasses.replace(TINY, dit=dataclasses.replace(TINY.dit, mean_flow=MeanFlowConfig()))


def random_backbone(model):
    rng = np.random.default_rng(0)
    shapes = blip3o.abstract_plain(model)["dit"]
    return {"dit": jax.tree.map(lambda leaf: jnp.float32(rng.normal(size=leaf.shape) / 4), shapes)}


def test_the_window_of_a_row_begins_at_its_scale_token_or_ends_with_the_row():
    size = 1 + TINY.num_image_tokens
    positions = jnp.broadcast_to(jnp.arange(size + 9.0), (2, size + 9))[..., None]
    spans = blip3o.condition_window(TINY, positions, jnp.array([3, 8]))[..., 0]
    np.testing.assert_array_equal(spans, np.array([[3], [8]]) + np.arange(size))
    tails = blip3o.condition_window(TINY, positions, jnp.array([3, 8]), "tail")[..., 0]
    np.testing.assert_array_equal(tails, np.array([[9], [9]]) + np.arange(size))


def test_a_backbone_gets_the_noise_level_and_the_interval_in_thousandths():
    rng, params = np.random.default_rng(1), random_backbone(MODEL)
    x, condition = (jnp.float32(rng.normal(size=s)) for s in [(2, 2, 3, 32), (2, 4, MODEL.dit.caption_channels)])

    @jax.jit
    def both(params, t, interval):
        ours = blip3o.velocity(MODEL, params, x, t / 1000, condition, until=(t - interval) / 1000)
        return ours, blip3o.apply(MODEL, params, "dit", "denoise", x, t, condition, interval)

    got, expected = both(params, jnp.array([700.0, 90.0]), jnp.array([500.0, 40.0]))
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert np.abs(got - both(params, jnp.array([700.0, 90.0]), jnp.array([100.0, 20.0]))[0]).max() > 0.1


def test_every_group_of_rows_stands_beside_the_same_references():
    model = dataclasses.replace(TINY, edit=dataclasses.replace(TINY.edit, vae_noise=True))
    rng, params = np.random.default_rng(1), random_backbone(model)
    x, reference = (jnp.float32(rng.normal(size=(2, 2, 3, 32))) for _ in range(2))
    conditions = [jnp.float32(rng.normal(size=(2, 4, model.dit.caption_channels))) for _ in range(2)]

    @jax.jit
    def together(params):
        encoded = tuple(blip3o.apply(model, params, "dit", "encode_condition", each) for each in conditions)
        return blip3o.velocity(model, params, jnp.concatenate([x, x]), jnp.float32(0.5), encoded, reference)

    @jax.jit
    def alone(params, condition):
        return blip3o.velocity(model, params, x, jnp.float32(0.5), condition, reference)

    expected = np.concatenate([alone(params, condition) for condition in conditions])
    np.testing.assert_allclose(together(params), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
