"""SimVQ: blocks of the codebook, ties, drawn codes, straight-through gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.models.vq import SimVQ, normalize, quantize


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


CODEBOOK = np.asarray(normalize(random(50, 6)))


def keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(3), count)


def test_codes_quantise_to_themselves():
    found = quantize(3.0 * CODEBOOK[None], CODEBOOK)
    np.testing.assert_array_equal(found.indices[0], np.arange(50))
    np.testing.assert_allclose(found.quantized[0], CODEBOOK, atol=1e-6)
    np.testing.assert_allclose(found.z[0], CODEBOOK, atol=1e-6)


@pytest.mark.parametrize("block", [1, 7, 25, 50, 64])
def test_blocks_of_the_codebook_do_not_change_codes(block):
    z = random(3, 40, 6, seed=1)
    expected = np.argmax(np.asarray(normalize(z), np.float64) @ CODEBOOK.T.astype(np.float64), axis=-1)
    np.testing.assert_array_equal(quantize(z, CODEBOOK, block=block).indices, expected)


def test_padding_of_the_last_block_is_never_chosen():
    codebook = np.asarray(normalize(np.abs(random(5, 6))))
    away = -np.abs(random(1, 30, 6, seed=1))  # every cosine is negative, that of the padding would be 0
    assert quantize(away, codebook, block=4).indices.max() < 5


def test_the_lowest_index_wins_a_tie():
    twice = np.concatenate([CODEBOOK, CODEBOOK])
    for block in (16, 100):
        np.testing.assert_array_equal(quantize(CODEBOOK[None], twice, block=block).indices[0], np.arange(50))


def test_drawn_codes_at_temperature_zero_are_the_nearest():
    z = random(2, 40, 6, seed=1)
    drawn = quantize(z, CODEBOOK, keys(2), temperature=0.0).indices
    np.testing.assert_array_equal(drawn, quantize(z, CODEBOOK).indices)
    assert (quantize(z, CODEBOOK, keys(2), temperature=0.3).indices != drawn).any()


@pytest.mark.parametrize("block", [20, 50])
def test_drawn_codes_follow_the_softmax(block):
    z = np.tile(random(1, 1, 6, seed=1), (1, 40_000, 1))
    drawn = np.asarray(quantize(z, CODEBOOK, keys(1), temperature=0.25, block=block).indices[0])
    logits = np.asarray(normalize(z[0, :1])) @ CODEBOOK.T / 0.25
    expected = np.asarray(jax.nn.softmax(logits[0]))
    np.testing.assert_allclose(np.bincount(drawn, minlength=50) / 40_000, expected, atol=0.008)
    assert expected.max() > 0.05


def test_drawn_codes_of_an_image_do_not_depend_on_its_batch():
    z = random(3, 40, 6, seed=1)
    together = quantize(z, CODEBOOK, keys(3), temperature=0.3).indices
    alone = quantize(z[1:2], CODEBOOK, keys(3)[1:2], temperature=0.3).indices
    np.testing.assert_array_equal(together[1:2], alone)
    assert (together[0] != quantize(z[:1], CODEBOOK, keys(3)[1:2], temperature=0.3).indices[0]).any()


def test_gradients_pass_straight_through_to_the_input_and_only_by_codes_to_the_codebook():
    z, weight = random(2, 5, 6, seed=1), random(2, 5, 6, seed=2)
    through = jax.grad(lambda z, c: (quantize(z, c).quantized * weight).sum(), (0, 1))(z, CODEBOOK)
    direct = jax.grad(lambda z: (normalize(z) * weight).sum())(z)
    np.testing.assert_allclose(through[0], direct, atol=1e-6)
    assert not np.any(through[1])
    by_codes = jax.grad(lambda c: (quantize(z, c).codes * weight).sum())(CODEBOOK)
    expected = np.zeros_like(CODEBOOK)
    np.add.at(expected, np.asarray(quantize(z, CODEBOOK).indices), weight)
    np.testing.assert_allclose(by_codes, expected, atol=1e-6)


def test_products_have_the_highest_precision_whatever_the_default():
    table = {"params": {"embedding": {"table": CODEBOOK}, "projection": {"kernel": CODEBOOK[:6], "bias": CODEBOOK[0]}}}
    with jax.default_matmul_precision("default"):
        program = jax.jit(lambda z: quantize(z, SimVQ(50, 6).apply(table)).indices).lower(random(1, 3, 6)).as_text()
    assert program.count("precision = [HIGHEST, HIGHEST]") == program.count("stablehlo.dot_general") == 2


@pytest.mark.parametrize("scale", [1e-11, 1e-4, 1e15])
def test_vectors_of_any_length_are_brought_to_one(scale):
    np.testing.assert_allclose(np.linalg.norm(normalize(scale * CODEBOOK), axis=-1), 1, rtol=1e-5)


def test_a_zero_vector_has_a_finite_gradient():
    assert np.isfinite(jax.grad(lambda z: normalize(z).sum())(jnp.zeros((2, 6)))).all()
