"""How the diffusion backbone is called."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.config import MeanFlowConfig
from blip3o_jax.config.presets import preset
from blip3o_jax.models import blip3o

TINY = preset("tiny")
MODEL = dataclasses.replace(TINY, dit=dataclasses.replace(TINY.dit, mean_flow=MeanFlowConfig()))


def test_a_backbone_gets_the_noise_level_and_the_interval_in_thousandths():
    rng = np.random.default_rng(0)
    shapes = blip3o.abstract_plain(MODEL)["dit"]
    params = {"dit": jax.tree.map(lambda leaf: jnp.float32(rng.normal(size=leaf.shape) / 4), shapes)}
    x, condition = (jnp.float32(rng.normal(size=s)) for s in [(2, 2, 3, 32), (2, 4, MODEL.dit.caption_channels)])

    @jax.jit
    def both(params, t, interval):
        ours = blip3o.velocity(MODEL, params, x, t / 1000, condition, until=(t - interval) / 1000)
        return ours, blip3o.apply(MODEL, params, "dit", "denoise", x, t, condition, interval)

    got, expected = both(params, jnp.array([700.0, 90.0]), jnp.array([500.0, 40.0]))
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert np.abs(got - both(params, jnp.array([700.0, 90.0]), jnp.array([100.0, 20.0]))[0]).max() > 0.1
