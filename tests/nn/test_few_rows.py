"""The layer of few kernels against the plain one, its kernels run by Pallas' interpreter."""

import dataclasses
import functools
import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from blip3o_jax import sharding, treepath
from blip3o_jax.config.presets import preset
from blip3o_jax.models.decoder import Block, attend_to
from blip3o_jax.nn import few_rows, int8, kernels
from blip3o_jax.nn.attention import MASKED
from blip3o_jax.nn.rope import rope_table

CONFIG = dataclasses.replace(
    preset("tiny").decoder,
    width=128, num_heads=4, num_kv_heads=2, head_dim=64, mlp_dim=256, norm_eps=0.1, dtype="bfloat16",
    param_dtype="bfloat16",
)  # fmt: skip


LINEAR = [*(f"attention/{name}" for name in ("query", "key", "value", "out")), "mlp/gate", "mlp/up", "mlp/down"]


def plain(params, x, cos, sin, *cached):
    attend = functools.partial(attend_to, *cached)
    return Block(CONFIG, parent=None).apply({"params": params}, x, cos, sin, attend)


def operands(rows: int, window: int, slots: int):
    """Parameters, and rows at slots of their own behind two slots of padding; the first begins a tile of slots."""
    random = np.random.default_rng(rows)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.bfloat16)

    x, past = normal(rows, window, CONFIG.width), (normal(rows, 2, slots, 64), normal(rows, 2, slots, 64))
    last = slots - window
    slot = jnp.asarray([min(few_rows.SLOT_TILE, last), *random.integers(5, last + 1, size=rows - 1)], jnp.int32)
    at = slot[:, None] + jnp.arange(window)
    seen = (jnp.arange(slots) <= at[..., None]) & (jnp.arange(slots) > 1)
    rope, bias = rope_table(at, 64, CONFIG.rope_theta), jnp.where(seen, 0.0, MASKED)[:, None, None]
    inputs = x, *rope, bias, past
    start = Block(CONFIG, parent=None).init(jax.random.key(0), x, *rope, functools.partial(attend_to, bias, past, slot))
    params = jax.tree.map(lambda leaf: leaf * (1 + 0.1 * normal(*leaf.shape)), nn.meta.unbox(start)["params"])
    return params, inputs, slot


def one(inputs, row):
    return jax.tree.map(lambda leaf: leaf[row : row + 1], inputs)


@pytest.mark.parametrize(
    "rows, window, slots, quantized", [(3, 1, 128, False), (2, 4, 193, False), (16, 1, 33, False), (2, 2, 70, True)]
)
def test_kernels_compute_the_layer_and_write_the_cache(rows, window, slots, quantized, monkeypatch):
    monkeypatch.setattr(few_rows, "WIDE", 512)  # features of some products
    params, inputs, slot = operands(rows, window, slots)
    if quantized:
        params = int8.quantize(params, LINEAR)
    assert few_rows.takes(params, inputs[0], inputs[-1])
    x, past = few_rows.layer(params, *inputs, slot, CONFIG.norm_eps, interpret=True)
    for row in range(rows):
        expected, cache = plain(params, *one(inputs, row), slot[row])
        change = np.abs(np.asarray(expected - inputs[0][row], np.float32)).max()
        np.testing.assert_allclose(np.float32(x[row]), np.float32(expected[0]), atol=0.02 * change, rtol=1 / 64)
        for got, right in zip(past, cache, strict=True):
            np.testing.assert_allclose(np.float32(got[row]), np.float32(right[0]), atol=0.02, rtol=1 / 64)


@pytest.mark.parametrize("own_slots", [True, False])
def test_devices_that_share_rows_compute_their_own(own_slots, monkeypatch):
    params, inputs, slot = operands(4, 2, 70)
    slot = slot if own_slots else slot[0]
    expected = few_rows.layer(params, *inputs, slot, CONFIG.norm_eps, interpret=True)
    monkeypatch.setattr(few_rows, "layer", functools.partial(few_rows.layer, interpret=True))
    monkeypatch.setattr(few_rows, "at_hand", lambda: True)
    step = jax.jit(lambda *operands: few_rows.cached_layer(plain, *operands, CONFIG.norm_eps))
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
    with sharding.use_mesh(mesh), kernels.forced_branch("cuda"):
        got = step(params, *inputs, slot)
    assert got[0].sharding.shard_shape(got[0].shape)[0] == 1
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.float32(a), np.float32(b))


def test_norms_may_have_scales_in_float32():
    params, inputs, slot = operands(2, 1, 70)
    expected = few_rows.layer(params, *inputs, slot, CONFIG.norm_eps, interpret=True)
    wide = treepath.map_with_path(lambda path, x: x.astype("float32") if path.endswith("scale") else x, params)
    assert few_rows.takes(wide, inputs[0], inputs[-1])
    got = few_rows.layer(wide, *inputs, slot, CONFIG.norm_eps, interpret=True)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.float32(a), np.float32(b))


@pytest.mark.parametrize(
    "rows, window, dtype",
    [(17, 1, "bfloat16"), (2, 9, "bfloat16"), (1, 9, "bfloat16"), (1, 1, "float32")],
    ids=["rows", "window", "queries of a key", "dtype"],
)
def test_other_layers_are_left_to_the_plain_form(rows, window, dtype):
    params, inputs, _ = operands(rows, window, 40)
    x, past = (jax.tree.map(lambda leaf: leaf.astype(dtype), tree) for tree in (inputs[0], inputs[-1]))
    assert not few_rows.takes(params, x, past)


def test_a_layer_with_an_adapter_or_of_other_sizes_is_left_to_the_plain_form():
    params, inputs, _ = operands(1, 1, 40)
    x, past = inputs[0], inputs[-1]
    assert few_rows.takes(params, x, past)
    assert not few_rows.takes(params, x, tuple(cache[..., :32] for cache in past))  # heads of 32 numbers
    up = params["mlp"]["up"]
    assert not few_rows.takes({**params, "mlp": {**params["mlp"], "up": {"kernel": up["kernel"][:, :200]}}}, x, past)
    params["mlp"]["up"] |= {
        "lora_a": jnp.zeros((128, 128), jnp.bfloat16),
        "lora_b": jnp.zeros((128, 256), jnp.bfloat16),
    }
    assert not few_rows.takes(params, x, past)


def test_programs_for_nvidia_hold_the_kernels_and_no_others_do(monkeypatch):
    pytest.importorskip("jax.experimental.pallas.triton")
    monkeypatch.setattr(few_rows, "at_hand", lambda: True)
    params, inputs, slot = operands(2, 1, 70)
    others = operands(34, 1, 70)[1:]

    h200 = AbstractDevice("NVIDIA H200", None, "gpu")  # Pallas for Triton asks which GPU, from jax 0.11 on

    def traced(*sizes, inputs=inputs, slot=slot):
        step = jax.jit(lambda *operands: few_rows.cached_layer(plain, *operands, CONFIG.norm_eps))
        mesh = AbstractMesh(sizes, sharding.AXES, (AxisType.Auto,) * 3, abstract_device=h200)
        with use_abstract_mesh(mesh):
            return step.trace(params, *inputs, slot)

    def text(platform):
        return traced(1, 1, 1).lower(lowering_platforms=(platform,)).as_text()

    assert text("cuda").count('name = "rows_times_kernel"') == 4
    assert text("cuda").count('name = "attend_to_cache"') == 1
    assert "rows_times_kernel" not in text("cpu") + text("tpu")
    with kernels.forced_branch("default"):
        assert "rows_times_kernel" not in text("cuda")

    def has_kernels(*sizes, **operands):
        return "rows_times_kernel" in str(traced(*sizes, **operands).jaxpr)

    assert has_kernels(1, 1, 1) and has_kernels(2, 1, 1) and has_kernels(1, 2, 1)
    assert not has_kernels(1, 1, 2) and not has_kernels(3, 1, 1)  # split within a row, rows that devices do not divide
    x, *more, slot = *others[0], others[1]
    assert not has_kernels(2, 1, 1, inputs=(x, *more), slot=slot)  # 17 rows per device
    half = jax.tree.map(lambda leaf: leaf[:32], (x, *more, slot))
    assert has_kernels(2, 1, 1, inputs=half[:-1], slot=half[-1])


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (("jax_cuda12_plugin", "jax.experimental.pallas.triton"), True),
        (("jax_cuda13_plugin", "jax.experimental.pallas.triton"), True),
        (("jax.experimental.pallas.triton",), False),
        (("jax_cuda13_plugin",), False),
    ],
)
def test_kernels_need_the_plugin_and_pallas_for_triton(found, expected, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in found or None)
    assert few_rows.at_hand.__wrapped__() == expected
