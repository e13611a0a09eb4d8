"""Cross-entropy over a large vocabulary in chunks of positions, without logits [B T V] in memory.

B batch, T positions, D width, V vocabulary, c positions per chunk.

The forward pass computes the gradients of a chunk while its logits [B c V] are in memory; the backward pass scales them
by the cotangent of the sum. This takes three matrix products instead of the four of recomputation. Chunks are cut along
the positions only, so the batch axis keeps its sharding. Chunks without any weight (prompts, references, padding) are
skipped at run time.
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
    """Computes the weighted cross-entropy of the logits `hidden @ rows.T`.

    Args:
      hidden: dtype[B T D].
      rows: dtype[V D] of the output projection; products are in this dtype, accumulated in float32.
      labels: i32[B T]; ignored where the weight is 0.
      weights: f32[B T], at least 0; not differentiated.
      chunk: maximum number of positions per chunk, at least 1; need not divide T.

    Returns:
      Sums f32[] of weight * cross-entropy, of the weights, and of the weights where the label has the highest logit.
    """
    weights = weights.astype(jnp.float32)
    total, correct = _summed(chunk_size(chunk, hidden.shape[1]), hidden, rows, labels, weights)
    return total, weights.sum(), correct


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(chunk, hidden, rows, labels, weights):
    """Returns sums f32[] of the weighted losses, and of the weights of correct predictions."""

    def step(number, totals):
        hidden, labels, weights = chunks.take(number)
        loss, correct, _, _ = _losses(_logits(hidden, rows), labels)
        return totals[0] + jnp.sum(weights * loss), totals[1] + jnp.sum(weights * correct)

    chunks = _Chunks.of(chunk, hidden, labels, weights)
    return jax.lax.fori_loop(0, chunks.count, step, (jnp.zeros(()), jnp.zeros(())))


def _forward(chunk, hidden, rows, labels, weights):
    dtype, wide = rows.dtype, rows.astype(jnp.float32)  # gradients are accumulated in float32

    def step(number, carry):
        total, correct, to_hidden, to_rows = carry
        hidden, labels, weights = chunks.take(number)
        logits, backward = jax.vjp(lambda hidden, rows: _logits(hidden, rows.astype(dtype)), hidden, wide)
        loss, right, own, logsum = _losses(logits, labels)
        some_to_hidden, more_to_rows = backward(weights[..., None] * (jnp.exp(logits - logsum[..., None]) - own))
        total, correct = total + jnp.sum(weights * loss), correct + jnp.sum(weights * right)
        return total, correct, chunks.put(number, to_hidden, some_to_hidden), to_rows + more_to_rows

    chunks = _Chunks.of(chunk, hidden, labels, weights)
    start = (jnp.zeros(()), jnp.zeros(()), jnp.zeros_like(chunks.arrays[0]), jnp.zeros_like(wide))
    total, correct, to_hidden, to_rows = jax.lax.fori_loop(0, chunks.count, step, start)
    return (total, correct), (to_hidden[:, : hidden.shape[1]], to_rows, jnp.zeros((), dtype))


def _backward(chunk, residuals, cotangents):
    del chunk
    to_hidden, to_rows, like = residuals
    factor = cotangents[0]  # the number of correct predictions has no gradient
    return (factor * to_hidden).astype(to_hidden.dtype), (factor * to_rows).astype(like.dtype), None, None


_summed.defvjp(_forward, _backward)


class _Chunks(NamedTuple):
    """Chunks along the positions, those with a nonzero weight first.

    Attributes:
      arrays: [B T ...] each, T padded with zeros to a multiple of c.
      starts: i32[T/c], first position of every chunk.
      count: i32[], number of chunks with a nonzero weight.
      size: c.
    """

    arrays: tuple[jax.Array, ...]
    starts: jax.Array
    count: jax.Array
    size: int

    @classmethod
    def of(cls, size: int, *arrays: jax.Array) -> "_Chunks":
        """Cuts arrays [B T ...], the last of which are the weights."""
        filled = -arrays[-1].shape[1] % size
        arrays = tuple(jnp.pad(x, ((0, 0), (0, filled)) + ((0, 0),) * (x.ndim - 2)) for x in arrays)
        weights = arrays[-1]
        empty = jnp.all(weights.reshape(weights.shape[0], -1, size) == 0, axis=(0, 2))
        return cls(arrays, size * jnp.argsort(empty), jnp.sum(~empty), size)

    def take(self, number: jax.Array) -> tuple[jax.Array, ...]:
        """Returns a chunk [B c ...] of every array."""
        parts = (jax.lax.dynamic_slice_in_dim(x, self.starts[number], self.size, 1) for x in self.arrays)
        return tuple(constrain(x, "batch", *(None,) * (x.ndim - 1)) for x in parts)

    def put(self, number: jax.Array, whole: jax.Array, part: jax.Array) -> jax.Array:
        """Returns `whole` [B T ...] with the chunk replaced by `part` [B c ...]."""
        return jax.lax.dynamic_update_slice_in_dim(whole, part, self.starts[number], 1)


def _logits(hidden: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns f32[B c V]."""
    return constrain(row_logits(hidden, rows), "batch", None, "act_vocab")


def _losses(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns cross-entropy f32[B c], correctness bool[B c], one-hot labels bool[B c V] and logsumexp f32[B c]."""
    own = jnp.arange(logits.shape[-1]) == labels[..., None]
    chosen = jnp.sum(jnp.where(own, logits, 0.0), axis=-1)
    total = jax.nn.logsumexp(logits, axis=-1)
    return total - chosen, chosen >= logits.max(axis=-1), own, total
