"""Pixel shuffling, shortcuts and the convolutions that change resolution or run in strips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.nn import conv, resample


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("factor", [2, 3])
def test_pixel_shuffle_inverts_pixel_unshuffle(factor):
    x = random(2, 6, 12, 5)
    small = resample.pixel_unshuffle(x, factor)
    assert small.shape == (2, 6 // factor, 12 // factor, 5 * factor * factor)
    np.testing.assert_array_equal(resample.pixel_shuffle(small, factor), x)


def test_pixels_of_a_cell_go_to_consecutive_channels_row_by_row():
    x = jnp.arange(8.0).reshape(1, 2, 2, 2)  # channel 0 holds 0 2 4 6, channel 1 holds 1 3 5 7
    np.testing.assert_array_equal(resample.pixel_unshuffle(x).ravel(), [0, 2, 4, 6, 1, 3, 5, 7])


def test_channels_are_averaged_and_repeated_in_consecutive_groups():
    x = jnp.arange(6.0).reshape(1, 1, 1, 6)
    np.testing.assert_array_equal(resample.average_channels(x, 2).ravel(), [1, 4])
    np.testing.assert_array_equal(resample.repeat_channels(x[..., :2], 4).ravel(), [0, 0, 1, 1])


def test_a_shortcut_down_undoes_a_shortcut_up():
    x = random(1, 3, 4, 8)
    np.testing.assert_allclose(resample.downsample_shortcut(resample.upsample_shortcut(x, 4), 8), x, atol=1e-6)


def test_upsampling_convolution_equals_convolution_of_the_repeated_picture():
    x = random(2, 5, 6, 4)
    params = {"kernel": random(3, 3, 4, 7, seed=1).astype(jnp.bfloat16), "bias": random(7, seed=2)}  # sums are float32
    large = x.repeat(2, axis=1).repeat(2, axis=2)
    expected = conv.Conv(7).apply({"params": params}, large)
    got = conv.UpsampleConv(7).apply({"params": params}, x)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("height", "size"),
    [(1, conv.STRIP_SIZE), (7, conv.STRIP_SIZE), (36, conv.STRIP_SIZE), (7, 1)],
    ids=["one row", "one strip", "several strips", "rows larger than a strip"],
)
@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((1, 0), (0, 1))], ids=["3x3", "2x2"])
def test_bfloat16_convolution_in_strips_equals_the_whole(height, size, padding, monkeypatch):
    monkeypatch.setattr(conv, "STRIP_SIZE", size)
    side = 1 + sum(padding[0])
    x = random(2, height, 100, 64).astype(jnp.bfloat16)
    kernel = (random(side, side, 64, 8, seed=1) / 24).astype(jnp.bfloat16)
    expected = conv.convolve(x.astype(jnp.float32), kernel.astype(jnp.float32), padding)
    got = conv.convolve(x, kernel, padding)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=0.02)
    program = jax.jit(lambda *operands: conv.convolve(*operands, padding)).lower(x, kernel).as_text()
    assert ("while" in program) == (height == 36 or size == 1)  # whether it runs in strips
