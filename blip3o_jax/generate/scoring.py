"""Log-probabilities of sampled tokens in one parallel pass: those of the distribution that they were drawn from.

B rows, T prompt positions, N sampled tokens, D decoder width, V tokens that may be sampled, c positions of a
chunk. A row is a prompt, padded on the left and ending in the scale token, and its completion. Rows that follow each
other and have the same prompt share its reading, as they do in sampling.

Differs from the reference:
1. Temperature, top-k, top-p and the restriction to image ids apply here as in sampling; the reference trains on the
   full softmax over the whole vocabulary whatever it sampled from.
2. A token that has dropped out of the truncated support since it was drawn is put back: its probability stays above 0.
3. Where tokens are guided, the distribution is the guided one; its unconditional half is a constant of the completions.
"""

import jax
import jax.numpy as jnp

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.diffusion.guidance import extrapolate
from blip3o_jax.generate import ar
from blip3o_jax.generate.ar import TokenSampling
from blip3o_jax.models import blip3o
from blip3o_jax.nn.linear import chunk_size, row_logits
from blip3o_jax.sharding import constrain, gather
from blip3o_jax.types import Completions, Params


def completion_log_probs(
    config: Blip3oConfig,
    params: Params,
    rollout: Completions,
    sampling: TokenSampling,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities f32[B N] of completions under `params`, and the entropy f32[B N] behind each token.

    Args:
      sampling: how the completions were drawn, not greedily.
      chunk: positions whose logits are held at a time.
    """
    hidden = completion_hidden(config, params, rollout)
    guidance = None if rollout.base is None else (rollout.base, rollout.token_guidance_scale)
    first, count = ar.vocabulary(config, sampling)
    head = blip3o.apply(config, params, "decoder", "head", first, count)
    return token_log_probs(hidden, head, rollout.completion - first, sampling, chunk, guidance)


def completion_hidden(config: Blip3oConfig, params: Params, rollout: Completions) -> jax.Array:
    """Hidden states [B N D] that predict the tokens of completions."""

    def first_of_prompt(x):
        return x.reshape(-1, rollout.prompt_rows, *x.shape[1:])[:, 0]

    names = ("tokens", "image_slot", "valid", "ref_codes", "ref_features")
    each = (getattr(rollout, name) for name in names)
    tokens, image_slot, valid, ref_codes, features = jax.tree.map(first_of_prompt, tuple(each))
    codes = jnp.zeros((len(tokens), 1, config.num_image_tokens), jnp.int32)  # of a target, which no prompt holds
    codes = codes if ref_codes is None else jnp.concatenate([codes, ref_codes], axis=1)
    prompts, _ = blip3o.embed_sequence(config, params, tokens, image_slot, codes, features)
    known = rollout.completion[:, :-1]  # the last predicts nothing
    known = blip3o.apply(config, params, "decoder", "embed_tokens", known)
    return blip3o.apply(config, params, "decoder", "branch", prompts, valid, known)


def token_log_probs(
    hidden: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    sampling: TokenSampling,
    chunk: int,
    guidance: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities f32[B N] of tokens, and the entropy f32[B N] of the distributions, without its gradient.

    Args:
      hidden: dtype[B N D].
      head: dtype[V D]; the product is taken in its dtype, accumulated in float32.
      tokens: i32[B N], rows of the head.
      sampling: the distribution: temperature and truncation.
      chunk: positions at a time at most, 1 or more; N need not be a multiple.
      guidance: where tokens are guided: hidden states dtype[B N D] of the prompts without their text, held constant,
        and f32[B], how far logits go from theirs to those of `hidden`, and beyond.
    """
    length = hidden.shape[1]
    chunk = chunk_size(chunk, length)
    base, scale = guidance or (None, None)
    # the gradients of all chunks are added up in float32, and then exchanged between devices
    dtype, head = head.dtype, gather(head.astype(jnp.float32), "vocab", "embed")

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, -length % chunk)) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    def join(x):
        return x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :length]

    def step(carry, part):
        hidden, tokens, base = part
        logits = constrain(row_logits(hidden, head.astype(dtype)), "batch", None, "act_vocab")
        if base is not None:
            base = jax.lax.stop_gradient(row_logits(base, head.astype(dtype)))
            logits = extrapolate(base, logits, scale[:, None, None])
        own = jnp.arange(logits.shape[-1]) == tokens[..., None]
        logits = jnp.where(own, logits / sampling.temperature, ar.truncate(logits, sampling))
        total = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.sum(jnp.where(own, logits, 0.0), axis=-1)
        known = jax.lax.stop_gradient(logits - total[..., None])
        entropy = -jnp.sum(jnp.where(jnp.isfinite(known), jnp.exp(known) * known, 0.0), axis=-1)
        return carry, (chosen - total, entropy)

    _, (log_probs, entropy) = jax.lax.scan(
        jax.checkpoint(step, prevent_cse=False), (), jax.tree.map(cut, (hidden, tokens, base))
    )
    return join(log_probs), join(entropy)
