"""What devices exchange that share a model along the axis `tensor`, or its weights along `fsdp`."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from blip3o_jax.config import DecoderConfig, ViTConfig
from blip3o_jax.models.decoder import Decoder
from blip3o_jax.models.siglip import SiglipVision
from blip3o_jax.plan.program import Collective, read
from blip3o_jax.sharding import batch_sharding, make_mesh, sharded_shapes, use_mesh

DECODER = Decoder(DecoderConfig(32, 64, 3, 256, 4, 2, 16, max_length=64))
TOWER = SiglipVision(ViTConfig(3, 64, 3, 256, 4, patch_size=2, num_positions=4, final_norm=False))
ROWS = jax.ShapeDtypeStruct((2, 8, 64), jnp.float32)
SEQUENCE = ROWS, jax.ShapeDtypeStruct((2, 8), jnp.int32), jax.ShapeDtypeStruct((2, 8), bool)


@pytest.mark.parametrize(
    ("model", "init", "example", "inputs"),
    [
        (DECODER, "init_all", jnp.zeros((1, 2), jnp.int32), SEQUENCE),
        (TOWER, "__call__", jnp.zeros((1, 4, 8, 3)), (jax.ShapeDtypeStruct((2, 4, 8, 3), jnp.float32),)),
    ],
    ids=["decoder", "tower"],
)
def test_a_layer_adds_up_two_products_and_moves_nothing_else(model, init, example, inputs):
    mesh = make_mesh({"tensor": 2}, jax.devices()[:2])
    params = sharded_shapes(jax.eval_shape(lambda: model.init(jax.random.key(0), example, method=init))["params"], mesh)
    with use_mesh(mesh):
        compiled = (
            jax.jit(lambda params, *inputs: model.apply({"params": params}, *inputs)).lower(params, *inputs).compile()
        )
    sums = 2 * model.config.depth  # of the attention and of the feed-forward layer
    assert read(compiled, mesh).collectives == (Collective("all-reduce", ("tensor",), sums, sums * 4 * ROWS.size),)


def test_weights_are_gathered_once_for_a_prompt_and_its_continuations():
    mesh = make_mesh({"fsdp": 2}, jax.devices()[:2])
    model = Decoder(dataclasses.replace(DECODER.config, remat="full"))
    example = jnp.zeros((1, 2), jnp.int32)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), example, method="init_all"))["params"]

    def exchanged(method, *shapes):
        def loss(params, *inputs):
            return model.apply({"params": params}, *inputs, method=method).sum()

        inputs = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh, len(x.shape), x.shape[0]))
            for x in shapes
        ]
        with use_mesh(mesh):
            compiled = jax.jit(jax.grad(loss)).lower(sharded_shapes(params, mesh), *inputs).compile()
        return read(compiled, mesh).collectives

    continuations = jax.ShapeDtypeStruct((8, 8, 64), jnp.float32)
    assert exchanged("branch", ROWS, SEQUENCE[2], continuations) == exchanged("__call__", *SEQUENCE)
