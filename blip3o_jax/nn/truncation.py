"""Top-k and top-p truncation of logits.

V tokens. Logits are compared by rank, an integer with the same order.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.nn.kernels import by_platform

SIGN = np.uint32(1 << 31)


def keep_likeliest(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """Sets logits f32[... V] to -inf outside the top k and, among these, outside the smallest set of mass top_p.

    Ties with the smallest kept logit are kept, as in transformers.

    Args:
      logits: f32[... V].
      top_k: 0, or V and above, keeps all.
      top_p: in (0, 1]; 1 keeps all.
    """
    count = top_k if 0 < top_k < logits.shape[-1] else logits.shape[-1]
    if count == logits.shape[-1] and top_p == 1:
        return logits
    logits = jnp.where(logits == 0, 0.0, logits)  # -0.0 ties with 0.0
    ranks = _ranks(logits)
    forms = {"cuda": _by_sorting, "tpu": functools.partial(_by_digits, bits=4), "default": _by_digits}
    forms = {platform: functools.partial(form, count=count, top_p=top_p) for platform, form in forms.items()}
    least = by_platform(jax.lax.stop_gradient(logits), ranks, **forms)
    return jnp.where(ranks >= least[..., None], logits, -jnp.inf)


def _by_digits(logits: jax.Array, ranks: jax.Array, count: int, top_p: float, bits: int = 1) -> jax.Array:
    """Returns the rank u32[...] of the smallest kept logit, found digit by digit of `bits` bits, a divisor of 32.

    Each digit reads the logits once: with four bits 8 times, with one bit 32 times and with less arithmetic. On CPU
    sorting is 20 times as slow as the binary search.
    """
    least = jnp.zeros(logits.shape[:-1], jnp.uint32)
    if count < logits.shape[-1]:
        least = _least(ranks, jnp.ones_like(logits), count, bits)
    if top_p < 1:
        kept = jnp.where(ranks >= least[..., None], logits, -jnp.inf)
        least = jnp.maximum(least, _least(ranks, jax.nn.softmax(kept, axis=-1), top_p, bits))
    return least


def _least(ranks: jax.Array, weights: jax.Array, total: float, bits: int) -> jax.Array:
    """Returns the largest rank u32[...] at and above which the weights f32[... V] sum to `total`; 0 if none."""

    def decide(step, least):
        unit = jnp.uint32(1) << (jnp.uint32(32 - bits) - jnp.uint32(bits) * step)
        bounds = least[..., None] + unit * jnp.arange(1, 2**bits, dtype=jnp.uint32)
        above = (ranks >= bounds[..., i, None] for i in range(bounds.shape[-1]))
        sums = jnp.stack([jnp.sum(jnp.where(kept, weights, 0.0), axis=-1) for kept in above], axis=-1)
        return least + unit * jnp.sum(sums >= total, axis=-1, dtype=jnp.uint32)

    return jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(32 // bits), decide, jnp.zeros(ranks.shape[:-1], jnp.uint32))


def _by_sorting(logits: jax.Array, ranks: jax.Array, count: int, top_p: float) -> jax.Array:
    """Does the same as `_by_digits` for GPUs, with about ten kernels instead of 320."""
    ordered = ~jnp.sort(~ranks, axis=-1)[..., :count]
    least = ordered[..., -1]
    if top_p == 1:
        return least
    kept = jnp.where(ranks >= least[..., None], logits, -jnp.inf)  # more than `count` where there are ties
    largest = _values(ordered[..., :1])
    reached = jnp.cumsum(jnp.exp(_values(ordered) - largest), axis=-1)
    reached = reached >= top_p * jnp.sum(jnp.exp(kept - largest), axis=-1, keepdims=True)
    return jnp.max(jnp.where(reached, ordered, least[..., None]), axis=-1)


def _ranks(logits: jax.Array) -> jax.Array:
    """Maps float32 logits to uint32 of the same order."""
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    return jnp.where(bits < SIGN, bits | SIGN, ~bits)


def _values(ranks: jax.Array) -> jax.Array:
    """Inverts `_ranks`."""
    return jax.lax.bitcast_convert_type(jnp.where(ranks < SIGN, ~ranks, ranks ^ SIGN), jnp.float32)
