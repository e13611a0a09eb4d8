"""Chunked cross-entropy: equal to the plain form in value and gradient, small in memory, at home on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax import sharding
from blip3o_jax.objectives.cross_entropy import chunked_cross_entropy
from support.small import jit

BATCH, LENGTH, WIDTH, VOCABULARY = 8, 13, 6, 37


def inputs(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    rows = rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
    labels = rng.integers(0, VOCABULARY, (BATCH, LENGTH))
    weights = rng.uniform(size=(BATCH, LENGTH)) * (rng.random((BATCH, LENGTH)) < 0.6)
    return jnp.asarray(hidden, dtype), jnp.asarray(rows, dtype), jnp.asarray(labels), jnp.asarray(weights, np.float32)


def plain(hidden, rows, labels, weights):
    scores = jnp.einsum("BTD,VD->BTV", hidden, rows, precision="highest")
    loss = -jnp.take_along_axis(jax.nn.log_softmax(scores), labels[..., None], -1)[..., 0]
    return (weights * loss).sum(), weights.sum(), (weights * (scores.argmax(-1) == labels)).sum()


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
def test_chunks_change_neither_value_nor_gradients(chunk):
    hidden, rows, labels, weights = inputs()
    labels = labels.at[0, 0].set(plain_argmax(hidden, rows)[0, 0])
    got = chunked_cross_entropy(hidden, rows, labels, weights, chunk)
    np.testing.assert_allclose(got, plain(hidden, rows, labels, weights), rtol=1e-6)
    assert got[2] > 0
    gradient = jit(jax.grad(lambda *x: chunked_cross_entropy(*x, labels, weights, chunk)[0], (0, 1)))(hidden, rows)
    expected = jit(jax.grad(lambda *x: plain(*x, labels, weights)[0], (0, 1)))(hidden, rows)
    for left, right in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-6 * np.abs(right).max())


def plain_argmax(hidden, rows):
    return jnp.einsum("BTD,VD->BTV", hidden, rows).argmax(-1)


def test_positions_without_weight_count_neither_in_value_nor_in_gradients():
    hidden, rows, labels, weights = inputs()
    ignored = jnp.where(weights == 0, -100, labels)
    got = chunked_cross_entropy(hidden, rows, ignored, weights, 5)
    np.testing.assert_allclose(got, plain(hidden, rows, labels, weights), rtol=1e-6)
    gradient = jit(jax.grad(lambda x: chunked_cross_entropy(x, rows, ignored, weights, 5)[0]))(hidden)
    assert not np.any(np.asarray(gradient)[np.asarray(weights) == 0])
    nothing = chunked_cross_entropy(hidden, rows, labels, jnp.zeros_like(weights), 5)
    assert [float(x) for x in nothing] == [0, 0, 0]


def test_bfloat16_gradients_of_many_chunks_are_rounded_once():
    hidden, rows, labels, weights = inputs(jnp.bfloat16)

    def gradient(chunk):
        return jit(jax.grad(lambda x: chunked_cross_entropy(hidden, x, labels, weights, chunk)[0]))(rows)

    whole, single = (np.asarray(gradient(chunk), np.float32) for chunk in (LENGTH, 1))
    assert np.abs(whole - single).max() <= np.abs(whole).max() * 2**-8


def test_scores_of_all_positions_are_never_held():
    shape = (2, 64, 2048)  # B T V
    structs = (
        jax.ShapeDtypeStruct((*shape[:2], 8), jnp.float32),
        jax.ShapeDtypeStruct((shape[2], 8), jnp.float32),
        jax.ShapeDtypeStruct(shape[:2], jnp.int32),
        jax.ShapeDtypeStruct(shape[:2], jnp.float32),
    )

    def memory(function):
        return jax.jit(jax.value_and_grad(function, (0, 1))).lower(*structs).compile().memory_analysis()

    scores = 4 * np.prod(shape)
    assert memory(lambda *x: plain(*x)[0]).temp_size_in_bytes > scores
    assert memory(lambda *x: chunked_cross_entropy(*x, 8)[0]).temp_size_in_bytes < scores / 2


def test_scores_are_computed_once_for_value_and_gradients():
    hidden, rows, labels, weights = inputs()
    gradient = jax.grad(lambda *x: chunked_cross_entropy(*x, labels, weights, 4)[0], (0, 1))
    assert str(jax.make_jaxpr(gradient)(hidden, rows)).count("dot_general[") == 3
    tripled = jax.grad(lambda x: 3 * chunked_cross_entropy(x, rows, labels, weights, 4)[0])(hidden)
    np.testing.assert_allclose(tripled, 3 * gradient(hidden, rows)[0], rtol=1e-6)


@pytest.mark.parametrize("learned", [(), (5,), (0, 12), (4, 5, 6, 7)])
def test_chunks_that_nothing_is_learnt_from_are_not_computed(learned):
    hidden, rows, labels, weights = inputs()
    weights = weights.at[:].set(0).at[:, learned].set(0.5)
    # scores that are not numbers would show in every sum: those of chunks without weights are never made
    chunks = {position // 4 for position in learned}
    spoilt = [position for position in range(LENGTH) if position // 4 not in chunks]
    function = jit(jax.value_and_grad(lambda *x: chunked_cross_entropy(*x, labels, weights, 4)[0], (0, 1)))
    (value, gradients), (expected, others) = function(hidden.at[:, spoilt].set(jnp.nan), rows), function(hidden, rows)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(gradients[0], others[0])
    np.testing.assert_array_equal(gradients[1], others[1])
    np.testing.assert_allclose(value, plain(hidden, rows, labels, weights)[0], rtol=1e-6)


def test_eight_devices_compute_what_one_computes_and_keep_their_rows():
    hidden, rows, labels, weights = inputs()
    function = jax.value_and_grad(lambda *x: chunked_cross_entropy(*x, 4)[0], (0, 1))
    value, gradients = jax.jit(function)(hidden, rows, labels, weights)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with sharding.use_mesh(mesh):
        batch = sharding.shard_batch((hidden, labels, weights), mesh)
        compiled = jax.jit(function).lower(batch[0], rows, *batch[1:]).compile()
        other, others = compiled(batch[0], jax.device_put(rows, compiled.input_shardings[0][1]), *batch[1:])
    np.testing.assert_allclose(other, value, rtol=1e-6)
    for left, right in zip(others, gradients, strict=True):
        np.testing.assert_allclose(np.asarray(left), np.asarray(right), atol=2e-6 * np.abs(right).max())
    assert others[0].sharding.spec[0] == ("data", "fsdp")
