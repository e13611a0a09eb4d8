"""Weights moved as integers: the same bits, and no widened copy of a decoder's layers."""

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.config import DecoderConfig
from blip3o_jax.models.decoder import Decoder
from blip3o_jax.nn.bits import from_bits, to_bits

CONFIG = DecoderConfig(32, 64, 16, 256, 4, 2, 16, max_length=64, dtype="bfloat16", param_dtype="bfloat16")


def test_bits_come_back_and_other_types_stay():
    tree = {"a": jnp.linspace(-3, 3, 12).astype(jnp.bfloat16), "b": jnp.arange(3.0), "c": jnp.arange(2)}
    bits = to_bits(tree)
    assert bits["a"].dtype == jnp.uint16 and bits["b"] is tree["b"] and bits["c"] is tree["c"]
    back = from_bits(bits)
    assert back["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(back["a"], np.float32), np.asarray(tree["a"], np.float32))


def test_prefill_in_bfloat16_holds_no_copy_of_the_layers():
    decoder = Decoder(CONFIG)
    params = jax.eval_shape(
        lambda key: decoder.init(key, jnp.zeros((1, 2), jnp.int32), method="init_all"), jax.random.key(0)
    )
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), jax.eval_shape(unboxed, params))["params"]
    size = sum(leaf.size * 2 for leaf in jax.tree.leaves(params["layers"]))

    def prefill(params, x):
        positions, valid = jnp.arange(4)[None], jnp.ones((1, 4), bool)
        return decoder.apply({"params": params}, x, positions, valid, 8, method="prefill")

    compiled = jax.jit(prefill).lower(params, jax.ShapeDtypeStruct((1, 4, CONFIG.width), jnp.bfloat16)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < size / 2


def unboxed(tree):
    return jax.tree.map(lambda x: x.unbox() if hasattr(x, "unbox") else x, tree, is_leaf=lambda x: hasattr(x, "unbox"))
