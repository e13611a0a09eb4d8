"""Cross-entropy over a large vocabulary, one stretch of positions at a time: [B T V] scores are never held.

B batch, T positions, D width, V vocabulary, c positions of a chunk.

The backward pass computes the scores of a chunk again, so that [B c V] is the most that lives at any time. Rows stay
where they are: chunks are cut along the positions, and the batch axis is never merged with them.
"""

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
    length = hidden.shape[1]
    chunk = min(chunk, length)
    dtype, rows = rows.dtype, rows.astype(jnp.float32)  # the gradients of all chunks are added up in float32

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    def step(totals, part):
        hidden, labels, weights = part
        scores = constrain(row_logits(hidden, rows.astype(dtype)), "batch", None, "act_vocab")
        own = jnp.arange(scores.shape[-1]) == labels[..., None]
        score = jnp.sum(jnp.where(own, scores, 0.0), axis=-1)
        loss = jax.nn.logsumexp(scores, axis=-1) - score
        correct = jax.lax.stop_gradient(score >= scores.max(axis=-1))
        return (totals[0] + jnp.sum(weights * loss), totals[1] + jnp.sum(weights * correct)), None

    weights = weights.astype(jnp.float32)
    parts = (cut(hidden), cut(labels), cut(weights))
    zeros = (jnp.zeros(()), jnp.zeros(()))
    (total, correct), _ = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), zeros, parts)
    return total, weights.sum(), correct
