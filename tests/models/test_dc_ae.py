"""Geometry, sizes, scaling and tiling of the autoencoder."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.config import DCAEConfig
from blip3o_jax.config.presets import DC_AE_F32C32, PRESETS
from blip3o_jax.config.schema import from_dict
from blip3o_jax.convert.tables import PARTS
from blip3o_jax.errors import UserError
from blip3o_jax.models.dc_ae import DCAE, Level
from blip3o_jax.models.tiling import tiled_decode, tiled_encode

TINY = dataclasses.replace(
    PRESETS["tiny"].autoencoder,
    encoder_channels=(8, 16), encoder_layers=(1, 1), encoder_blocks=("ResBlock", "EfficientViTBlock"),
    encoder_multiscales=((), (5,)), decoder_channels=(8, 16), decoder_layers=(1, 1),
    decoder_blocks=("ResBlock", "EfficientViTBlock"), decoder_multiscales=((), (5,)), latent_channels=4,
)  # fmt: skip


def abstract(config):
    return jax.eval_shape(lambda: DCAE(config).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), method="init_all"))


@pytest.fixture(scope="module")
def params():
    init = functools.partial(DCAE(TINY).init, method="init_all")
    return nn.meta.unbox(jax.jit(init)(jax.random.key(0), jnp.zeros((1, 2, 2, 3))))["params"]


@functools.partial(jax.jit, static_argnames=("method", "config"))
def apply(params, method, x, config=TINY):
    return DCAE(config).apply({"params": params}, x, method=method)


def random(*shape):
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def test_released_geometry_has_the_published_number_of_parameters():
    parts = abstract(DC_AE_F32C32)["params"]
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in parts.items()}
    assert counts == {"encoder": 153_027_104, "decoder": 159_223_171}


@pytest.mark.parametrize("preset", ["blip3o-next-3b", "tiny"])
def test_every_parameter_is_the_target_of_one_rule(preset):
    leaves = jax.tree_util.tree_flatten_with_path(nn.meta.unbox(abstract(PRESETS[preset].autoencoder)["params"]))[0]
    inverse = [dataclasses.replace(rule, source=rule.target, target=rule.target) for rule in PARTS["autoencoder"].rules]
    for path, _ in leaves:
        name = "/".join(str(key.key) for key in path)
        assert sum(rule.match(name) is not None for rule in inverse) == 1, name


def test_every_parameter_names_its_axes():
    boxes = jax.tree.leaves(abstract(TINY), is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    assert all(isinstance(box, nn.LogicallyPartitioned) and len(box.names) == box.value.ndim for box in boxes)


@pytest.mark.parametrize("size", [(2, 2), (10, 6)], ids=str)
def test_pictures_of_any_multiple_of_the_factor_come_back_in_their_size(params, size):
    image = random(1, *size, 3)
    latent = apply(params, "encode", image)
    assert latent.shape == (1, size[0] // 2, size[1] // 2, 4)
    assert apply(params, "decode", latent).shape == image.shape


@pytest.mark.parametrize("size", [(3, 2), (2, 5), (0, 2)], ids=str)
def test_other_sizes_are_refused_in_one_line(params, size):
    with pytest.raises(UserError, match=f"got {size[1]}x{size[0]} - expected multiples of 2"):
        apply(params, "encode", random(1, *size, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_layers": (1, 1, 1)}, "expected 2 of each"),
        ({"decoder_layers": (1, 0)}, "at every level but the first"),
        ({"decoder_blocks": ("ResBlock", "Block")}, "got 'Block'"),
        ({"encoder_channels": (8, 20)}, "multiple of head_dim 8"),
        ({"latent_channels": 3}, "multiple of latent_channels 3"),
    ],
)
def test_levels_that_cannot_be_built_are_refused_with_the_configuration(change, message):
    with pytest.raises(UserError, match=message):
        from_dict(DCAEConfig, dataclasses.asdict(TINY) | change)


def test_scaled_latents_differ_by_the_factor_and_decode_to_the_same_picture(params):
    image = random(1, 10, 6, 3)
    latent, scaled = apply(params, "encode", image), apply(params, "encode_scaled", image)
    np.testing.assert_allclose(scaled, latent * 0.41407, rtol=1e-6)
    expected = apply(params, "decode", latent)
    np.testing.assert_allclose(apply(params, "decode_scaled", scaled), expected, atol=1e-5)


def test_latents_and_pictures_are_float32_and_close_in_bfloat16(params):
    config = dataclasses.replace(TINY, dtype="bfloat16")
    image = random(1, 10, 6, 3)
    latent = apply(params, "encode", image)
    low = apply(params, "encode", image, config)
    assert low.dtype == jnp.float32
    assert jnp.abs(low - latent).max() <= 0.05 * jnp.abs(latent).max()
    decoded = apply(params, "decode", latent, config)
    assert decoded.dtype == jnp.float32
    assert jnp.abs(decoded - apply(params, "decode", latent)).max() <= 0.1


@pytest.mark.parametrize(("method", "shape"), [("encode", (1, 4, 4, 3)), ("decode", (1, 2, 2, 4))])
def test_levels_of_a_bfloat16_model_pass_on_bfloat16(params, method, shape):
    model = DCAE(dataclasses.replace(TINY, dtype="bfloat16"))

    def outputs(params, x):
        of_levels = {"capture_intermediates": lambda module, _: isinstance(module, Level)}
        return model.apply({"params": params}, x, method=method, **of_levels)[1]

    levels = jax.tree.leaves(jax.eval_shape(outputs, params, random(*shape)))
    assert [level.dtype for level in levels] == [jnp.bfloat16] * 2


def test_one_tile_equals_the_whole(params):
    image, latent = random(1, 10, 6, 3), random(1, 5, 3, 4)
    encoded = tiled_encode(lambda x: apply(params, "encode", x), image, tile=10, stride=6)
    np.testing.assert_array_equal(encoded, apply(params, "encode", image))
    decoded = tiled_decode(lambda x: apply(params, "decode", x), latent, tile=5, stride=3)
    np.testing.assert_array_equal(decoded, apply(params, "decode", latent))


def test_tiles_of_a_local_function_are_seamless():
    image = random(1, 20, 30, 3)
    halves = tiled_encode(lambda x: jnp.asarray(x[:, ::2, ::2]), image, tile=8, stride=6)
    np.testing.assert_allclose(halves, image[:, ::2, ::2], atol=1e-6)


@pytest.mark.parametrize("axis", [1, 2])
def test_full_tiles_have_one_shape_and_the_fade_is_linear(axis):
    sizes, values = [], iter([0.0, 8.0, 8.0, 8.0])

    def decode(x):
        sizes.append(x.shape[axis])
        assert x.shape[3 - axis] == 2
        return np.full((1, 2 * x.shape[1], 2 * x.shape[2], 3), next(values), np.float32)

    latent = random(1, 13, 2, 4) if axis == 1 else random(1, 2, 13, 4)
    out = np.moveaxis(tiled_decode(decode, latent, tile=6, stride=4), axis, 3)[0, 0, 0]
    assert sizes == [6, 6, 5, 1]  # the last is smaller than the overlap
    np.testing.assert_array_equal(out, [0] * 8 + [0, 2, 4, 6] + [8] * 14)


def test_tiles_that_do_not_fall_on_latent_cells_are_refused():
    image = random(1, 20, 30, 3)
    with pytest.raises(UserError, match="expected multiples of 2"):
        tiled_encode(lambda x: jnp.asarray(x[:, ::2, ::2]), image, tile=8, stride=5)
    for stride in (0, 9):
        with pytest.raises(UserError, match=f"stride {stride} and side 8"):
            tiled_encode(lambda x: x, image, tile=8, stride=stride)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_blocks_are_recomputed_on_request_with_the_same_parameters_and_gradients(params, remat):
    config, pixels = dataclasses.replace(TINY, remat=remat), random(1, 4, 4, 3)
    assert jax.tree.structure(abstract(config)) == jax.tree.structure(abstract(TINY))

    def gradient(config):
        def error(params):
            return jnp.square(apply(params, "decode", apply(params, "encode", pixels, config), config) - pixels).mean()

        return jax.grad(error)

    counts = [str(jax.make_jaxpr(gradient(each))(params)).count("prevent_cse=True") for each in (TINY, config)]
    assert counts[0] == 0 and counts[1] >= 4  # a block of every level of either side
    expected, got = (jax.jit(gradient(each))(params) for each in (TINY, config))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)
