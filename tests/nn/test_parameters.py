"""Initial values of parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.config import ViTConfig
from blip3o_jax.models.siglip import PatchEmbedding, PositionEmbedding
from blip3o_jax.models.vq import SimVQ
from blip3o_jax.nn.conv import Conv, DepthwiseConv, UpsampleConv
from blip3o_jax.nn.linear import Embedding, GroupedLinear, Linear

TOWER = ViTConfig(3, 64, 1, 64, 4, patch_size=5, num_positions=100, final_norm=False)


def initial(module, *inputs):
    return nn.meta.unbox(module.init(jax.random.key(0), *inputs))["params"]


@pytest.mark.parametrize(
    ("module", "shape", "terms"),  # terms: how many products make up one output
    [
        (Linear(96, (None, None)), (1, 40), 40),
        (Conv(24), (1, 2, 2, 40), 9 * 40),
        (UpsampleConv(24), (1, 2, 2, 40), 9 * 40),
        (DepthwiseConv(5), (1, 2, 2, 400), 25),
        (GroupedLinear(16), (1, 2, 2, 320), 16),
        (PatchEmbedding(TOWER), (1, 5, 5, 3), 75),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_kernels_are_uniform_within_the_bound_of_torch(module, shape, terms):
    params, bound = initial(module, jnp.zeros(shape)), terms**-0.5
    values = np.abs(params["kernel"])
    assert 0.98 * bound < values.max() <= 1.0001 * bound
    assert values.mean() == pytest.approx(bound / 2, rel=0.05)
    assert not np.any(params.get("bias", 0))


@pytest.mark.parametrize(
    ("module", "inputs", "stddev"),
    [
        (Embedding(200, 40), (jnp.arange(2),), 0.02),
        (SimVQ(200, 40), (), 1.0),
        (PositionEmbedding(TOWER), (10, 10), 0.02),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_tables_are_normal_with_their_deviation(module, inputs, stddev):
    params = initial(module, *inputs)
    table = np.asarray(params.get("embedding", params)["table"])
    assert table.std() == pytest.approx(stddev, rel=0.05) and abs(table.mean()) < 0.05 * stddev
    assert np.abs(table).max() > 3 * stddev
