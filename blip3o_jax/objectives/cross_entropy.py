"""Cross-entropy over a large vocabulary, one stretch of positions at a time: [B T V] scores are never held.

B batch, T positions, D width, V vocabulary, c positions of a chunk.

The sum is linear in what its gradient is multiplied with, so the forward pass of training computes the gradients of a
chunk while it has its scores: three products in place of the four that computing the scores again would take, and
[B c V] is the most that lives at any time. Rows stay where they are: chunks are cut along the positions, and the batch
axis is never merged with them. Chunks that no row learns from (prompts, references, filling) are left out while the
program runs: how many there are is not part of its shape.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from blip3o_jax.nn.linear import chunk_size, row_logits
from blip3o_jax.sharding import constrain


def chunked_cross_entropy(
    hidden: jax.Array, rows: jax.Array, labels: jax.Array, weights: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted cross-entropy of the scores `hidden @ rows.T`, with the gradients of the plain form.

    Args:
      hidden: dtype[B T D].
      rows: dtype[V D] of the output projection; the product is taken in their dtype, accumulated in float32.
      labels: i32[B T]; read where the weight is not 0.
      weights: f32[B T], >= 0; 0 leaves a position out. Constants to differentiation.
      chunk: positions at a time at most, 1 or more; T need not be a multiple.

    Returns:
      f32[] sum of weight * cross-entropy, f32[] sum of the weights, and f32[] sum of the weights of the positions
      whose label has the highest score.
    """
    weights = weights.astype(jnp.float32)
    total, correct = _summed(chunk_size(chunk, hidden.shape[1]), hidden, rows, labels, weights)
    return total, weights.sum(), correct


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(chunk, hidden, rows, labels, weights):
    """f32[] weighted sum of the losses, and f32[] weights of the positions whose label is likeliest."""

    def step(number, totals):
        hidden, labels, weights = chunks.take(number)
        loss, correct, _, _ = _losses(_scores(hidden, rows), labels)
        return totals[0] + jnp.sum(weights * loss), totals[1] + jnp.sum(weights * correct)

    chunks = _Chunks.of(chunk, hidden, labels, weights)
    return jax.lax.fori_loop(0, chunks.count, step, (jnp.zeros(()), jnp.zeros(())))


def _forward(chunk, hidden, rows, labels, weights):
    dtype, wide = rows.dtype, rows.astype(jnp.float32)  # the gradients of all chunks are added up in float32

    def step(number, carry):
        total, correct, to_hidden, to_rows = carry
        hidden, labels, weights = chunks.take(number)
        scores, backward = jax.vjp(lambda hidden, rows: _scores(hidden, rows.astype(dtype)), hidden, wide)
        loss, likeliest, own, logsum = _losses(scores, labels)
        some_to_hidden, more_to_rows = backward(weights[..., None] * (jnp.exp(scores - logsum[..., None]) - own))
        total, correct = total + jnp.sum(weights * loss), correct + jnp.sum(weights * likeliest)
        return total, correct, chunks.put(number, to_hidden, some_to_hidden), to_rows + more_to_rows

    chunks = _Chunks.of(chunk, hidden, labels, weights)
    start = (jnp.zeros(()), jnp.zeros(()), jnp.zeros_like(chunks.arrays[0]), jnp.zeros_like(wide))
    total, correct, to_hidden, to_rows = jax.lax.fori_loop(0, chunks.count, step, start)
    return (total, correct), (to_hidden[:, : hidden.shape[1]], to_rows, jnp.zeros((), dtype))


def _backward(chunk, residuals, cotangents):
    del chunk
    to_hidden, to_rows, like = residuals
    factor = cotangents[0]  # what is likeliest has no gradient
    return (factor * to_hidden).astype(to_hidden.dtype), (factor * to_rows).astype(like.dtype), None, None


_summed.defvjp(_forward, _backward)


class _Chunks(NamedTuple):
    """Chunks along the positions, those with a weight first: the others are not computed.

    Attributes:
      arrays: [B T ...] each, T filled up with zeros to a multiple of c.
      starts: i32[T/c], where chunks begin.
      count: i32[], chunks with a weight.
      size: c.
    """

    arrays: tuple[jax.Array, ...]
    starts: jax.Array
    count: jax.Array
    size: int

    @classmethod
    def of(cls, size: int, *arrays: jax.Array) -> "_Chunks":
        """Of arrays [B T ...], the last of them the weights."""
        filled = -arrays[-1].shape[1] % size
        arrays = tuple(jnp.pad(x, ((0, 0), (0, filled)) + ((0, 0),) * (x.ndim - 2)) for x in arrays)
        weights = arrays[-1]
        empty = jnp.all(weights.reshape(weights.shape[0], -1, size) == 0, axis=(0, 2))
        return cls(arrays, size * jnp.argsort(empty), jnp.sum(~empty), size)

    def take(self, number: jax.Array) -> tuple[jax.Array, ...]:
        """[B c ...] of every array."""
        parts = (jax.lax.dynamic_slice_in_dim(x, self.starts[number], self.size, 1) for x in self.arrays)
        return tuple(constrain(x, "batch", *(None,) * (x.ndim - 1)) for x in parts)

    def put(self, number: jax.Array, whole: jax.Array, part: jax.Array) -> jax.Array:
        """`whole` [B T ...] with [B c ...] in the place of the chunk."""
        return jax.lax.dynamic_update_slice_in_dim(whole, part, self.starts[number], 1)


def _scores(hidden: jax.Array, rows: jax.Array) -> jax.Array:
    """f32[B c V]."""
    return constrain(row_logits(hidden, rows), "batch", None, "act_vocab")


def _losses(scores: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Cross-entropy f32[B c], whether the label is likeliest, bool[B c V] where it is, and f32[B c] log of the sum."""
    own = jnp.arange(scores.shape[-1]) == labels[..., None]
    score = jnp.sum(jnp.where(own, scores, 0.0), axis=-1)
    total = jax.nn.logsumexp(scores, axis=-1)
    return total - score, score >= scores.max(axis=-1), own, total
