"""The vision transformer: patches, positions, stacked layers, numerics options."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.config import ViTConfig
from blip3o_jax.models.siglip import PatchEmbedding, PositionEmbedding, SiglipVision
from blip3o_jax.sharding import make_mesh, shardings_of, use_mesh

CONFIG = ViTConfig(3, 32, 3, 48, 4, patch_size=5, num_positions=9, final_norm=True)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def boxed():
    return jax.jit(SiglipVision(CONFIG).init)(jax.random.key(0), jnp.zeros((1, 17, 17, 3)))["params"]


@pytest.fixture(scope="module")
def params(boxed):
    noise = iter(range(100))
    return jax.tree.map(lambda x: x + 0.1 * random(*x.shape, seed=next(noise)), nn.meta.unbox(boxed))


def run(params, pixels, config=CONFIG):
    return jax.jit(SiglipVision(config).apply)({"params": params}, pixels)


def test_patches_are_a_strided_convolution_that_drops_the_border():
    pixels = random(2, 17, 19, 3)
    module = PatchEmbedding(CONFIG)
    params = nn.meta.unbox(module.init(jax.random.key(0), pixels)["params"])
    params["bias"] = params["bias"] + random(32)
    layout = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(pixels, params["kernel"], (5, 5), "VALID", dimension_numbers=layout)
    np.testing.assert_allclose(module.apply({"params": params}, pixels), expected + params["bias"], atol=1e-5)
    assert expected.shape == (2, 3, 3, 32)


def test_positions_are_the_table_where_the_grid_is_its_own(params):
    module = PositionEmbedding(CONFIG)
    table = {"params": params["position_embedding"]}
    np.testing.assert_array_equal(module.apply(table, 3, 3).reshape(9, 32), params["position_embedding"]["table"])
    assert module.apply(table, 4, 7).shape == (4, 7, 32)


def test_without_positions_patches_may_be_permuted(params):
    flat = {**params, "position_embedding": {"table": jnp.zeros((9, 32))}}
    pixels = random(1, 15, 15, 3)
    swapped = np.concatenate([pixels[:, 5:10], pixels[:, :5], pixels[:, 10:]], axis=1)
    expected = run(flat, pixels).reshape(1, 3, 3, 32)[:, [1, 0, 2]].reshape(1, 9, 32)
    np.testing.assert_allclose(run(flat, swapped), expected, atol=1e-5)
    placed = run(params, swapped).reshape(1, 3, 3, 32)[:, [1, 0, 2]].reshape(1, 9, 32)
    assert np.abs(placed - run(params, pixels)).max() > 1e-2


@pytest.mark.parametrize("how", [{"remat": "full"}, {"remat": "dots"}, {"unroll": True}])
def test_rematerialisation_and_unrolling_change_neither_tree_nor_gradient(params, how):
    pixels = random(1, 15, 15, 3)
    other = dataclasses.replace(CONFIG, **how)
    plain, saved = (jax.grad(lambda p, c=c: jnp.square(run(p, pixels, c)).sum())(params) for c in (CONFIG, other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, saved)


def test_the_backward_pass_recomputes_products_on_request(params):
    def program(**change):
        config = dataclasses.replace(CONFIG, **change)
        return str(jax.make_jaxpr(jax.grad(lambda params: run(params, random(1, 15, 15, 3), config).sum()))(params))

    programs = [program(remat=remat) for remat in ("none", "dots", "full")]
    none, dots, full = (each.count("dot_general") for each in programs)
    assert none < dots < full
    unrolled = program(remat="full", unroll=True).count("prevent_cse=True")  # a scan prevents it by itself
    assert (unrolled, programs[2].count("prevent_cse=True")) == (CONFIG.depth, 0)


def test_sharded_on_eight_devices_equals_one(boxed, params):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = jax.device_put(params, shardings_of(boxed, mesh))
    assert not placed["layers"]["mlp"]["in"]["kernel"].sharding.is_fully_replicated
    pixels = random(4, 15, 15, 3)
    with use_mesh(mesh):
        sharded = run(placed, pixels)
    np.testing.assert_allclose(sharded, run(params, pixels), atol=2e-5)


def test_bfloat16_is_close_to_float32(params):
    pixels = random(1, 15, 15, 3)
    low = run(params, pixels, dataclasses.replace(CONFIG, dtype="bfloat16"))
    assert low.dtype == jnp.bfloat16
    raw = dataclasses.replace(CONFIG, dtype="bfloat16", final_norm=False)
    assert jax.eval_shape(lambda: run(params, pixels, raw)).dtype == jnp.float32
    np.testing.assert_allclose(low.astype(jnp.float32), run(params, pixels), atol=0.1)


def test_without_layers_a_patch_is_told_by_itself_alone():
    config, pixels, other = dataclasses.replace(CONFIG, depth=0), random(1, 15, 15, 3), random(1, 15, 15, 3, seed=1)
    params = nn.meta.unbox(jax.jit(SiglipVision(config).init)(jax.random.key(0), pixels)["params"])
    assert set(params) == {"patch_embedding", "final_norm"}
    other[:, 5:] = pixels[:, 5:]  # the first row of patches is another
    changed = np.abs(run(params, other, config) - run(params, pixels, config)).max(axis=2)[0] > 0
    assert changed.tolist() == [True] * 3 + [False] * 6
