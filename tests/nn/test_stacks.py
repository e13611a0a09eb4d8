"""Stacks of layers and tables in bfloat16: no widened copy of them on CPU, gradients, nothing of it elsewhere."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.config import DecoderConfig, SanaConfig, ViTConfig
from blip3o_jax.config.schema import with_dtype
from blip3o_jax.models.decoder import Decoder
from blip3o_jax.models.sana import Sana
from blip3o_jax.models.siglip import SiglipVision
from blip3o_jax.nn import kernels
from blip3o_jax.nn.kernels import scan_layers, take_rows

DECODER = DecoderConfig(32, 64, 16, 256, 4, 2, 16, max_length=64)
SANA = SanaConfig(
    in_channels=4,
    out_channels=4,
    depth=16,
    num_heads=8,
    head_dim=8,
    num_cross_heads=4,
    cross_head_dim=16,
    caption_channels=12,
)
TOWER = ViTConfig(3, 64, 16, 256, 4, patch_size=2, num_positions=4, final_norm=False)

TOKENS, EMBEDDINGS = jnp.zeros((1, 2), jnp.int32), jnp.linspace(-1, 1, 256).reshape(1, 4, 64)
ROW = EMBEDDINGS, jnp.arange(4)[None], jnp.ones((1, 4), bool)
NOISY = jnp.linspace(-1, 1, 24).reshape(1, 2, 3, 4), jnp.ones(1) * 500
CONDITION = jnp.linspace(-1, 1, 60).reshape(1, 5, 12)
PIXELS = jnp.linspace(-1, 1, 48).reshape(1, 4, 4, 3)

CASES = {  # module, its stack, arguments and method of init, arguments and method of what is run
    "prefill": (Decoder, DECODER, "layers", (TOKENS,), "init_all", (*ROW, 8), "prefill"),
    "states": (Decoder, DECODER, "layers", (TOKENS,), "init_all", ROW, "__call__"),
    "condition": (Sana, SANA, "blocks", (*NOISY, CONDITION), "denoise", (CONDITION,), "encode_condition"),
    "velocity": (Sana, SANA, "blocks", (*NOISY, CONDITION), "denoise", (*NOISY, CONDITION), "denoise"),
    "tower": (SiglipVision, TOWER, "layers", (PIXELS,), "__call__", (PIXELS,), "__call__"),
}


def prepared(case: str, dtype: str, **options):
    """Parameters, a function of them, and the name of the stack within them."""
    kind, config, stack, example, init, inputs, method = CASES[case]
    model = kind(dataclasses.replace(with_dtype(config, dtype, dtype), **options))
    params = nn.meta.unbox(jax.jit(lambda key: model.init(key, *example, method=init)["params"])(jax.random.key(0)))

    def run(params, *inputs):
        size = (8,) if method == "prefill" else ()
        return model.apply({"params": params}, *inputs, *size, method=method)

    return params, run, inputs[:3], stack


def temporary_bytes(function, *arguments) -> int:
    return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("case", CASES)
def test_inference_in_bfloat16_holds_no_copy_of_the_stacked_weights(case):
    params, run, inputs, stack = prepared(case, "bfloat16")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params[stack]))
    assert temporary_bytes(run, params, *inputs) < size / 2


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("case", CASES)
def test_programs_for_accelerators_move_no_weights_as_integers(case, platform):
    params, run, inputs, _ = prepared(case, "bfloat16")

    def text(platform):
        return jax.jit(run).trace(params, *inputs).lower(lowering_platforms=(platform,)).as_text()

    def moved(text):  # stacks of 16 layers
        return [line for line in text.splitlines() if "bitcast_convert" in line and "tensor<16x" in line]

    assert moved(text("cpu"))
    assert not moved(text(platform)) and "optimization_barrier" not in text(platform)


@pytest.mark.parametrize(("case", "remat"), [("velocity", "full"), ("tower", "none")])
def test_gradients_of_bfloat16_weights_are_those_of_the_ordinary_scan(case, remat, monkeypatch):
    params, run, inputs, _ = prepared(case, "bfloat16", remat=remat, depth=2)

    def loss(params):
        out = run(params, *inputs).astype(jnp.float32)
        return (out * jnp.sin(jnp.arange(out.size)).reshape(out.shape)).mean(), out

    picked = jax.jit(loss)(params)[1]
    (_, differentiated), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    monkeypatch.setattr(kernels, "_scan_on_cpu", kernels._scan)
    (_, expected), expected_gradient = jax.jit(jax.value_and_grad(lambda params: loss(params), has_aux=True))(params)
    np.testing.assert_array_equal(differentiated, expected)
    np.testing.assert_allclose(picked, expected, atol=0.05 * float(jnp.abs(expected).max()))
    jax.tree.map(np.testing.assert_array_equal, widened(gradient), widened(expected_gradient))
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(widened(gradient)))


def widened(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def test_looking_up_rows_in_a_loop_copies_no_table_and_has_the_gradient_of_indexing():
    table, ids = jnp.linspace(-2, 2, 64 * 32).reshape(64, 32).astype(jnp.bfloat16), jnp.array([[3, 60], [3, 0]])

    def total(table, ids):
        def step(i, carry):
            return carry + take_rows(table, ids + i).astype(jnp.float32).sum()

        return jax.lax.fori_loop(0, 4, step, jnp.float32(0))

    assert temporary_bytes(total, table, ids) < table.nbytes / 2
    np.testing.assert_array_equal(jax.jit(take_rows)(table, ids).astype(jnp.float32), table[ids].astype(jnp.float32))
    weights = jnp.arange(2 * 2 * 32.0).reshape(2, 2, 32)
    got = jax.grad(lambda table: (take_rows(table, ids) * weights).sum())(table)
    want = jax.grad(lambda table: (table[ids] * weights).sum())(table)
    np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))
    assert math.isclose(
        float(got[3].astype(jnp.float32).sum()), float((weights[0, 0] + weights[1, 0]).sum()), rel_tol=1e-2
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool_])
@pytest.mark.parametrize("shape", [(5,), (2, 4), (3, 3, 5), (2, 3, 3, 2)], ids=str)
def test_a_scan_passes_on_the_elements_of_a_stack_exactly(shape, dtype):
    stack = (jax.random.normal(jax.random.key(0), (4, *shape)) * 100).astype(dtype)

    def layer(carry, element, shared):
        return carry + 1, element

    count, elements = jax.jit(lambda stack: scan_layers(layer, (stack,), 0, None))(stack)
    assert count == 4 and elements.dtype == dtype
    np.testing.assert_array_equal(elements.astype(jnp.float32), stack.astype(jnp.float32))
