"""The image tokenizer: geometry, pool scales, stages, errors."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.config import TATokConfig, ViTConfig
from blip3o_jax.config.presets import TA_TOK
from blip3o_jax.config.schema import with_dtype
from blip3o_jax.errors import UserError
from blip3o_jax.models.ta_tok import TATok, average_pool

CONFIG = TATokConfig(
    encoder=ViTConfig(3, 24, 2, 32, 4, patch_size=3, num_positions=49, final_norm=False),
    decoder=ViTConfig(12, 24, 1, 32, 2, patch_size=1, num_positions=16, final_norm=True),
    image_size=23,
    bottleneck_dim=12,
    codebook_size=40,
)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def boxed(config: TATokConfig):
    pixels = jnp.zeros((1, config.image_size, config.image_size, 3))
    return TATok(config).init(jax.random.key(0), pixels)["params"]


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda: nn.meta.unbox(boxed(CONFIG)))()


def run(params, method, x, *scale, config=CONFIG, **options):
    apply = jax.jit(lambda p, x, o: TATok(config).apply({"params": p}, *x, *scale, method=method, **o))
    return apply(params, [] if x is None else [x], options)


PIXELS = random(2, 23, 23, 3)


def vit_head_size(width: int, mlp: int) -> int:
    """Parameters of an attention-pooling head: probe, attention, norm, MLP."""
    return width + 4 * (width * width + width) + 2 * width + 2 * width * mlp + mlp + width


def test_released_geometry_has_the_published_number_of_parameters():
    shapes = nn.meta.unbox(jax.eval_shape(lambda: boxed(TA_TOK)))
    size = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in shapes.items()}
    layer = sum(leaf.size for leaf in jax.tree.leaves(shapes["encoder"]["layers"])) // 26
    aside = {
        "last encoder layer": layer,
        "post_layernorm": 2 * 1152,
        "encoder head": vit_head_size(1152, 4304),
        "decoder head": vit_head_size(1152, 3072),
    }
    # google/siglip2-so400m-patch14-384: the vision model alone
    assert size["encoder"] + layer + aside["post_layernorm"] + aside["encoder head"] == 428_225_600
    assert size["quantizer"] == 65_536 * 1536 + 1536 * 1536 + 1536
    assert (sum(size.values()), sum(aside.values())) == (548_153_248, 42_878_752)  # 591,032,000


@pytest.mark.parametrize("pool_scale, tokens", [(1, 729), (2, 169), (3, 81)])
def test_released_geometry_has_the_published_token_counts(pool_scale, tokens):
    assert TA_TOK.num_tokens(pool_scale) == tokens
    shapes = nn.meta.unbox(jax.eval_shape(lambda: boxed(TA_TOK)))
    pixels = jax.ShapeDtypeStruct((2, 384, 384, 3), jnp.float32)
    output = jax.eval_shape(lambda p, x: run(p, "encode", x, pool_scale, config=TA_TOK), shapes, pixels)
    assert (output.indices.shape, output.indices.dtype) == ((2, tokens), jnp.int32)
    assert output.features.shape == (2, tokens, 1152)
    assert output.quantized.shape == output.z.shape == output.codes.shape == (2, tokens, 1536)
    decoded = jax.eval_shape(lambda p, i: run(p, "decode_from_indices", i, config=TA_TOK), shapes, output.indices)
    assert decoded.shape == (2, tokens, 1152)


def test_every_parameter_names_its_axes():
    tree = jax.eval_shape(lambda: boxed(CONFIG))
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    assert all(len(leaf.names) == leaf.value.ndim for leaf in leaves)


def test_pooling_averages_whole_cells_and_drops_the_rest():
    x = random(2, 49, 3)
    grid = x.reshape(2, 7, 7, 3)
    pooled = np.asarray(average_pool(x, 7, 3)).reshape(2, 2, 2, 3)
    np.testing.assert_allclose(pooled[:, 1, 0], grid[:, 3:6, 0:3].mean((1, 2)), atol=1e-6)
    np.testing.assert_array_equal(average_pool(x, 7, 1), x)


def test_a_codebook_at_hand_changes_nothing(params):
    codebook = run(params, "codebook", None)
    np.testing.assert_allclose(np.linalg.norm(codebook, axis=-1), 1, atol=1e-6)
    own, given = run(params, "encode", PIXELS), run(params, "encode", PIXELS, codebook=codebook)
    jax.tree.map(np.testing.assert_array_equal, own, given)
    other = run(params, "encode", PIXELS, codebook=codebook[::-1])
    np.testing.assert_array_equal(other.indices, 39 - own.indices)


def test_decoding_codes_equals_decoding_their_indices(params):
    output, decoded = run(params, "__call__", PIXELS)
    assert decoded.shape == (2, 49, 24)
    np.testing.assert_allclose(run(params, "decode", output.quantized), decoded, atol=1e-6)
    np.testing.assert_allclose(run(params, "decode_from_indices", output.indices), decoded, atol=1e-5)


def test_features_are_those_of_encode_and_codes_may_be_drawn(params):
    output = run(params, "encode", PIXELS, 2)
    np.testing.assert_allclose(run(params, "features", PIXELS, 2), output.features, atol=1e-6)
    for temperature, share in ((0.0, 0.0), (2.0, 0.5)):  # of codes that are not the nearest
        config = dataclasses.replace(CONFIG, temperature=temperature)
        drawn = run(params, "encode", PIXELS, 2, keys=jax.random.split(jax.random.key(0)), config=config)
        assert (drawn.indices != output.indices).mean() >= share
        assert share or (drawn.indices == output.indices).all()


def test_images_of_a_batch_do_not_see_each_other(params):
    together, alone = run(params, "encode", PIXELS), run(params, "encode", PIXELS[1:])
    np.testing.assert_array_equal(together.indices[1:], alone.indices)


def test_distances_stay_float32_in_bfloat16(params):
    output, decoded = run(params, "__call__", PIXELS, config=with_dtype(CONFIG, dtype="bfloat16"))
    results = output.features, output.z, output.codes, output.quantized, decoded
    assert {leaf.dtype for leaf in results} == {jnp.dtype("float32")}
    np.testing.assert_allclose(np.linalg.norm(output.z, axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(output.features, run(params, "features", PIXELS), atol=0.05)


@pytest.mark.parametrize(
    "method, inputs, words",
    [
        ("encode", (PIXELS[:, :22],), "23, 23, 3"),
        ("features", (PIXELS[0],), "23, 23, 3"),
        ("encode", (PIXELS, 8), "pool_scale"),
        ("encode", (PIXELS, 0), "pool_scale"),
        ("decode", (random(1, 48, 12),), "square"),
    ],
)
def test_wrong_inputs_are_named(params, method, inputs, words):
    with pytest.raises(UserError, match=words):
        run(params, method, *inputs)


def test_positions_of_the_decoder_follow_the_pooled_grid(params):
    output = run(params, "encode", PIXELS, 3)
    assert math.isqrt(output.indices.shape[1]) == 2
    assert run(params, "decode", output.quantized).shape == (2, 4, 24)
