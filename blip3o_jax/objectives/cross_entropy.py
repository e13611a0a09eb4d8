"""Cross-entropy over a large vocabulary, one stretch of positions at a time: [B T V] scores are never held.

B batch, T positions, D width, V vocabulary, c positions of a chunk.

The sum is linear in what its gradient is multiplied with, so the forward pass of training computes the gradients of a
chunk while it has its scores: three products in place of the four that computing the scores again would take, and
[B c V] is the most that lives at any time. Rows stay where they are: chunks are cut along the positions, and the batch
axis is never merged with them.
"""

import functools

import jax
import jax.numpy as jnp

from blip3o_jax.nn.linear import row_logits
from blip3o_jax.sharding import constrain


def chunked_cross_entropy(
    hidden: jax.Array, rows: jax.Array, labels: jax.Array, weights: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted cross-entropy of the scores `hidden @ rows.T`, with the gradients of the plain form.

    Args:
      hidden: dtype[B T D].
      rows: dtype[V D] of the output projection; the product is taken in their dtype, accumulated in float32.
      labels: i32[B T]; read where the weight is not 0.
      weights: f32[B T], >= 0; 0 leaves a position out.
      chunk: positions at a time, 1 or more; T need not be a multiple.

    Returns:
      f32[] sum of weight * cross-entropy, f32[] sum of the weights, and f32[] sum of the weights of the positions
      whose label has the highest score.
    """
    weights = weights.astype(jnp.float32)
    total, correct = _summed(min(chunk, hidden.shape[1]), hidden, rows, labels, weights)
    return total, weights.sum(), correct


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(chunk, hidden, rows, labels, weights):
    """f32[] weighted sum of the losses, and f32[] weights of the positions whose label is likeliest."""

    def step(totals, part):
        hidden, labels, weights = part
        loss, correct, _, _ = _losses(_scores(hidden, rows), labels)
        return (totals[0] + jnp.sum(weights * loss), totals[1] + jnp.sum(weights * correct)), None

    totals, _ = jax.lax.scan(step, (jnp.zeros(()), jnp.zeros(())), _cut(chunk, hidden, labels, weights))
    return totals


def _forward(chunk, hidden, rows, labels, weights):
    dtype, wide = rows.dtype, rows.astype(jnp.float32)  # the gradients of all chunks are added up in float32

    def step(carry, part):
        hidden, labels, weights = part
        scores, backward = jax.vjp(lambda hidden, rows: _scores(hidden, rows.astype(dtype)), hidden, wide)
        loss, correct, own, total = _losses(scores, labels)
        to_hidden, to_rows = backward(weights[..., None] * (jnp.exp(scores - total[..., None]) - own))
        sums = (carry[0] + jnp.sum(weights * loss), carry[1] + jnp.sum(weights * correct), carry[2] + to_rows)
        return sums, (to_hidden, loss)

    start = (jnp.zeros(()), jnp.zeros(()), jnp.zeros_like(wide))
    (total, correct, to_rows), parts = jax.lax.scan(step, start, _cut(chunk, hidden, labels, weights))
    to_hidden, loss = (_joined(part, hidden.shape[1]) for part in parts)
    return (total, correct), (to_hidden, to_rows, loss, jnp.zeros((), dtype))


def _backward(chunk, residuals, cotangents):
    del chunk
    to_hidden, to_rows, loss, like = residuals
    factor = cotangents[0]  # what is likeliest has no gradient
    to_hidden, to_rows = (factor * to_hidden).astype(to_hidden.dtype), (factor * to_rows).astype(like.dtype)
    return to_hidden, to_rows, None, factor * loss


_summed.defvjp(_forward, _backward)


def _scores(hidden: jax.Array, rows: jax.Array) -> jax.Array:
    """f32[B c V]."""
    return constrain(row_logits(hidden, rows), "batch", None, "act_vocab")


def _losses(scores: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Cross-entropy f32[B c], whether the label is likeliest, bool[B c V] where it is, and f32[B c] log of the sum."""
    own = jnp.arange(scores.shape[-1]) == labels[..., None]
    score = jnp.sum(jnp.where(own, scores, 0.0), axis=-1)
    total = jax.nn.logsumexp(scores, axis=-1)
    return total - score, score >= scores.max(axis=-1), own, total


def _cut(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[B T ...] -> [T/c B c ...], filled up with zeros."""

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk)) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    return tuple(cut(x) for x in arrays)


def _joined(parts: jax.Array, length: int) -> jax.Array:
    """[T/c B c ...] -> [B T ...]."""
    x = parts.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
