"""The likeliest of many tokens: top-k, then top-p.

V tokens. Scores are compared by their rank, an integer in the same order.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.nn.kernels import by_platform

SIGN = np.uint32(1 << 31)


def keep_likeliest(logits: jax.Array, top_k: int, top_p: float) -> jax.Array:
    """The logits f32[... V], -inf but for the k largest and, of these, the fewest whose probabilities reach top_p.

    Ties with the smallest logit kept are kept, as transformers keeps them.

    Args:
      logits: f32[... V].
      top_k: 0 or V and above keep all.
      top_p: in (0, 1], 1 keeps all.
    """
    count = top_k if 0 < top_k < logits.shape[-1] else logits.shape[-1]
    if count == logits.shape[-1] and top_p == 1:
        return logits
    logits = jnp.where(logits == 0, 0.0, logits)  # -0.0 ties with 0.0
    ranks = _ranks(jax.lax.stop_gradient(logits))
    forms = {"cuda": _by_sorting, "default": _by_bits}
    forms = {platform: functools.partial(form, count=count, top_p=top_p) for platform, form in forms.items()}
    least = by_platform(jax.lax.stop_gradient(logits), ranks, **forms)
    return jnp.where(ranks >= least[..., None], logits, -jnp.inf)


def _by_bits(logits: jax.Array, ranks: jax.Array, count: int, top_p: float) -> jax.Array:
    """u32[...], the rank of the smallest logit kept, found bit by bit: sorting takes twenty times as long on CPU."""
    least = jnp.zeros(logits.shape[:-1], jnp.uint32)
    if count < logits.shape[-1]:
        least = _least(ranks, jnp.ones_like(logits), count)
    if top_p < 1:
        kept = jnp.where(ranks >= least[..., None], logits, -jnp.inf)
        least = jnp.maximum(least, _least(ranks, jax.nn.softmax(kept, axis=-1), top_p))
    return least


def _least(ranks: jax.Array, weights: jax.Array, total: float) -> jax.Array:
    """u32[...], the largest rank from which on the weights f32[... V] add up to `total`; 0 if none."""

    def decide(step, least):
        candidate = least | SIGN >> step
        reached = jnp.sum(jnp.where(ranks >= candidate[..., None], weights, 0.0), axis=-1) >= total
        return jnp.where(reached, candidate, least)

    return jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(32), decide, jnp.zeros(ranks.shape[:-1], jnp.uint32))


def _by_sorting(logits: jax.Array, ranks: jax.Array, count: int, top_p: float) -> jax.Array:
    """As `_by_bits`, for a GPU: the search launches 320 kernels, this about ten."""
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
    """u32, ordered as float32 numbers are."""
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    return jnp.where(bits < SIGN, bits | SIGN, ~bits)


def _values(ranks: jax.Array) -> jax.Array:
    """The inverse of `_ranks`."""
    return jax.lax.bitcast_convert_type(jnp.where(ranks < SIGN, ~ranks, ranks ^ SIGN), jnp.float32)
