"""Decoder: the loop over layers in both forms."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.config import DecoderConfig
from blip3o_jax.models.decoder import Decoder

CONFIG = DecoderConfig(40, 16, 3, 32, 4, 2, 8, max_length=32)
POSITIONS = jnp.broadcast_to(jnp.arange(6), (2, 6))
VALID = jnp.array([[True] * 6, [True] * 4 + [False] * 2])


@pytest.fixture(scope="module")
def params():
    tokens = jnp.zeros((1, 2), jnp.int32)
    return nn.meta.unbox(Decoder(CONFIG).init(jax.random.key(0), tokens, method="init_all"))


@pytest.mark.parametrize("change", [{"unroll": True}, {"unroll": True, "remat": "full"}, {"remat": "dots"}], ids=str)
def test_unrolled_and_rematerialised_layers_have_the_same_states_caches_and_gradients(params, change):
    x = jax.random.normal(jax.random.key(1), (2, 6, CONFIG.width))

    def loss(params, config):
        return jnp.square(Decoder(config).apply(params, x, POSITIONS, VALID)).sum()

    other = dataclasses.replace(CONFIG, **change)
    expected, got = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, c) for c in (CONFIG, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, expected)
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(got[1]["params"]["layers"]))

    expected, got = (Decoder(c).apply(params, x, POSITIONS, VALID, 8, method="prefill") for c in (CONFIG, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected)


def test_continuations_of_padded_prompts_have_the_states_of_whole_rows(params):
    rng = np.random.default_rng(2)
    prompts, rest = (
        rng.normal(size=shape).astype(np.float32) for shape in [(2, 5, CONFIG.width), (6, 3, CONFIG.width)]
    )
    valid = np.arange(5) >= np.array([[0], [2]])
    got = jax.jit(lambda *inputs: Decoder(CONFIG).apply(params, *inputs, method="branch"))(prompts, valid, rest)
    rows = np.concatenate([prompts.repeat(3, axis=0), rest], axis=1)
    seen = np.concatenate([valid.repeat(3, axis=0), np.ones((6, 3), bool)], axis=1)
    whole = Decoder(CONFIG).apply(params, rows, np.maximum(np.cumsum(seen, axis=1) - 1, 0), seen)
    np.testing.assert_allclose(got, whole[:, 4:], atol=1e-5)
