"""Log-probabilities of sampled tokens in one parallel pass: those of the distribution that they were drawn from.

B rows, T prompt positions, N sampled tokens, D decoder width, V rows of the head that may be sampled, c positions of a
chunk. A row is a prompt, padded on the left and ending in the scale token, and its completion. Rows that follow each
other and have the same prompt share its reading, as they do in sampling.

Differs from the reference:
1. Temperature, top-k, top-p and the restriction to image ids apply here as in sampling; the reference trains on the
   full softmax over the whole vocabulary whatever it sampled from.
2. A token that has dropped out of the truncated support since it was drawn is put back: its probability stays above 0.
3. Where tokens are guided, the distribution is the guided one; what the decoder says without the text is held constant.
"""

import jax
import jax.numpy as jnp

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.generate import ar
from blip3o_jax.generate.ar import TokenSampling
from blip3o_jax.models import blip3o
from blip3o_jax.nn.linear import chunk_size, row_logits
from blip3o_jax.sharding import constrain
from blip3o_jax.types import Params


def completion_log_probs(
    config: Blip3oConfig,
    params: Params,
    tokens: jax.Array,
    valid: jax.Array,
    image_slot: jax.Array,
    completion: jax.Array,
    ref_codes: jax.Array | None,
    ref_features: jax.Array | None,
    sampling: TokenSampling,
    chunk: int,
    unguided: dict[str, jax.Array] | None = None,
    guidance_scale: jax.Array | float = 1.0,
    prompt_rows: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities f32[B N] of completions under `params`, and the entropy f32[B N] behind each token.

    Args:
      tokens, valid, image_slot: i32, bool, i32 [B T] of the prompts.
      completion: i32[B N] vocabulary ids.
      ref_codes: i32[B R N], of reference images.
      ref_features: f32[B R N F], where the model takes them.
      sampling: how the completions were drawn, not greedily.
      chunk: positions whose scores are held at a time.
      unguided: tokens, valid and image_slot of the same prompts without their text; None: no guidance.
      guidance_scale: of the tokens, see `ar.start`.
      prompt_rows: rows in a row, a divisor of B, that have one prompt and its references.
    """
    images = (completion, ref_codes, ref_features, prompt_rows)
    hidden = completion_states(config, params, tokens, valid, image_slot, *images)
    without = None
    if unguided is not None:
        rows = (unguided[name] for name in ("tokens", "valid", "image_slot"))
        without = completion_states(config, jax.lax.stop_gradient(params), *rows, *images)
    first = ar.first_row(config, sampling)
    size = config.tokens.num_image_tokens if sampling.image_ids_only else None
    rows = blip3o.apply(config, params, "decoder", "head", first, size)
    return token_log_probs(hidden, rows, completion - first, sampling, chunk, without, guidance_scale)


def completion_states(
    config: Blip3oConfig,
    params: Params,
    tokens: jax.Array,
    valid: jax.Array,
    image_slot: jax.Array,
    completion: jax.Array,
    ref_codes: jax.Array | None,
    ref_features: jax.Array | None,
    prompt_rows: int,
) -> jax.Array:
    """Hidden states [B N D] that predict the tokens of completions; arguments as in `completion_log_probs`."""
    tokens, valid, image_slot, ref_codes, ref_features = jax.tree.map(
        lambda x: x.reshape(-1, prompt_rows, *x.shape[1:])[:, 0], (tokens, valid, image_slot, ref_codes, ref_features)
    )
    codes = jnp.zeros((len(tokens), 1, config.num_image_tokens), jnp.int32)  # of a target, which no prompt holds
    codes = codes if ref_codes is None else jnp.concatenate([codes, ref_codes], axis=1)
    prompts, _ = blip3o.embed_sequence(config, params, tokens, image_slot, codes, ref_features)
    known = blip3o.apply(config, params, "decoder", "embed_tokens", completion[:, :-1])  # the last predicts nothing
    return blip3o.apply(config, params, "decoder", "branch", prompts, valid, known)


def token_log_probs(
    hidden: jax.Array,
    rows: jax.Array,
    ids: jax.Array,
    sampling: TokenSampling,
    chunk: int,
    without: jax.Array | None = None,
    guidance_scale: jax.Array | float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities f32[B N] of tokens, and the entropy f32[B N] of the distributions, without its gradient.

    Args:
      hidden: dtype[B N D].
      rows: dtype[V D] of the head; the product is taken in their dtype, accumulated in float32.
      ids: i32[B N], rows of the head.
      sampling: the distribution: temperature and truncation.
      chunk: positions at a time at most, 1 or more; N need not be a multiple.
      without: dtype[B N D], states of the prompts without their text, where tokens are guided; held constant.
      guidance_scale: how far scores go from those of `without` to those of `hidden`, and beyond.
    """
    length = hidden.shape[1]
    chunk = chunk_size(chunk, length)
    dtype, rows = rows.dtype, rows.astype(jnp.float32)  # the gradients of all chunks are added up in float32

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    def join(x):
        return x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :length]

    def step(carry, part):
        hidden, ids, without = part
        scores = constrain(row_logits(hidden, rows.astype(dtype)), "batch", None, "act_vocab")
        if without is not None:
            base = jax.lax.stop_gradient(row_logits(without, rows.astype(dtype)))
            scores = base + guidance_scale * (scores - base)
        own = jnp.arange(scores.shape[-1]) == ids[..., None]
        scores = jnp.where(own, scores / sampling.temperature, ar.truncate(scores, sampling))
        total = jax.nn.logsumexp(scores, axis=-1)
        score = jnp.sum(jnp.where(own, scores, 0.0), axis=-1)
        known = jax.lax.stop_gradient(scores - total[..., None])
        entropy = -jnp.sum(jnp.where(jnp.isfinite(known), jnp.exp(known) * known, 0.0), axis=-1)
        return carry, (score - total, entropy)

    _, (log_probs, entropy) = jax.lax.scan(
        jax.checkpoint(step, prevent_cse=False), (), jax.tree.map(cut, (hidden, ids, without))
    )
    return join(log_probs), join(entropy)
