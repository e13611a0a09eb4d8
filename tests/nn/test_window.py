"""Windows of rows: read and written from one index, or from an index of each row, in the form of every platform."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.nn import kernels
from blip3o_jax.nn.attention import softmax_attention
from blip3o_jax.nn.window import read_window, write_window

ARRAY = jnp.arange(24.0).reshape(2, 3, 4)


@pytest.mark.parametrize("branch", ["default", "tpu"])
def test_windows_begin_at_an_index_of_each_row(branch):
    with kernels.forced_branch(branch):
        read = read_window(ARRAY, jnp.array([0, 2]), 2, axis=2)
        written = write_window(ARRAY, jnp.zeros((2, 1, 4)), jnp.array([2, 0]))
        last = write_window(ARRAY, jnp.full((2, 3, 3), 7.0), jnp.array([1, 0]), axis=2)
    np.testing.assert_array_equal(read, np.stack([ARRAY[0, :, :2], ARRAY[1, :, 2:]]))
    expected = np.array(ARRAY)
    expected[0, 2] = expected[1, 0] = 0
    np.testing.assert_array_equal(written, expected)
    np.testing.assert_array_equal(last[0], np.concatenate([ARRAY[0, :, :1], np.full((3, 3), 7)], axis=1))
    np.testing.assert_array_equal(last[1], np.concatenate([np.full((3, 3), 7), ARRAY[1, :, 3:]], axis=1))


def test_windows_begin_at_one_index_for_all_rows():
    np.testing.assert_array_equal(read_window(ARRAY, jnp.int32(1), 2), ARRAY[:, 1:3])
    np.testing.assert_array_equal(write_window(ARRAY, jnp.zeros((2, 3, 1)), 3, axis=2)[..., 3], np.zeros((2, 3)))


@pytest.mark.parametrize(("platform", "indices"), [("tpu", "2x2x1xi32"), ("cuda", "2x2xi32")])
def test_a_tpu_has_an_index_for_every_entry(platform, indices):
    """With one for every row, its compiler makes a loop over the rows of each write to the cache."""
    start, values = jnp.array([0, 1]), jnp.zeros((2, 2, 4))
    writing = jax.jit(write_window).trace(ARRAY, values, start).lower(lowering_platforms=(platform,)).as_text()
    assert f"tensor<{indices}>, tensor<2x2x4xf32>" in writing


def test_a_single_row_is_read_and_written_as_a_slice():
    row, values = ARRAY[:1], jnp.full((1, 2, 4), 7.0)

    def both(row, values, start):
        return read_window(row, start, 2), write_window(row, values, start)

    read, written = both(row, values, jnp.array([1]))
    np.testing.assert_array_equal(read, row[:, 1:])
    np.testing.assert_array_equal(written[:, 1:], values)
    program = jax.jit(both).trace(row, values, jnp.array([1])).lower(lowering_platforms=("tpu",)).as_text()
    assert "dynamic_update_slice" in program and not re.search("gather|scatter", program)


def test_a_decoding_loop_does_not_copy_its_cache():
    """XLA on CPU would repeat a write for every reader and copy the cache for each, in every iteration."""

    def step(i, state):
        cache, x = state
        cache = tuple(write_window(old, x[:, None, None, :] * jnp.ones((1, 4, 1, 1)), i, axis=2) for old in cache)
        out = softmax_attention(jnp.tile(x[:, None, None, :], (1, 1, 8, 1)), *cache)
        return cache, out.mean((1, 2))

    cache = (jnp.zeros((1, 4, 50, 16)),) * 2
    loop = jax.jit(lambda cache, x: jax.lax.fori_loop(0, jnp.int32(x.sum()), step, (cache, x)))
    program = loop.lower(cache, jnp.ones((1, 16))).compile().as_text()
    bodies = [part for part in re.split(r"\n(?=[%E])", program) if part.startswith("%")]  # all but the entry
    assert any("f32[1,4,50,16]" in body for body in bodies)
    assert not any(re.search(r"f32\[1,4,50,16\]\S* copy\(", body) for body in bodies)
