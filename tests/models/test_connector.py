"""The projection to the condition: its scale before training, and its norm of small vectors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.config import ConnectorConfig
from blip3o_jax.models.connector import Connector

CONFIG = ConnectorConfig(24, 64, gain=3.0)


@pytest.fixture(scope="module")
def params():
    return nn.meta.unbox(Connector(CONFIG).init(jax.random.key(0), jnp.zeros((1, 24))))["params"]


def test_an_untrained_one_has_the_gain_as_root_mean_square(params):
    x = np.random.default_rng(0).normal(size=(5, 24)).astype(np.float32)
    y = np.asarray(Connector(CONFIG).apply({"params": params}, x), np.float64)
    np.testing.assert_allclose(np.sqrt(np.square(y).mean(axis=1)), 3.0, rtol=1e-3)


def test_small_vectors_are_not_brought_to_the_gain(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    flat = {**zeros, "norm": params["norm"], "out": {**zeros["out"], "bias": jnp.full(64, 0.003)}}
    y = Connector(CONFIG).apply({"params": flat}, jnp.ones((1, 24)))
    np.testing.assert_allclose(y, 3.0 * 0.003 / np.sqrt(0.003**2 + 1e-5), rtol=1e-5)
