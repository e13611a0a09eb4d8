"""Autoregressive decoding of image tokens: one prefill per prompt, then a cached loop.

P prompts, B = P * samples rows, T prompt positions, N tokens to decode, D decoder width, V tokens to choose from.

Source: BLIP3o-NEXT `generate_images` (its first half), transformers `GenerationMixin` (order of the logits warpers).
Differs from the reference:
1. The hidden states that condition the DiT are those of the loop itself; the reference runs a second forward pass
   without a cache and without the padding mask.
2. By default only image ids are sampled (`image_ids_only`), from those rows of the head alone.
3. Row r of a batch has its own key: its tokens do not depend on the batch around it.
4. The log-probabilities are those of the distribution that was sampled from, truncation included.
5. Tokens may be guided away from what the decoder says without the text (arXiv 2406.06525).
"""

import dataclasses
from typing import Annotated

import flax.struct
import jax
import jax.numpy as jnp

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.schema import Range
from blip3o_jax.diffusion import guidance
from blip3o_jax.errors import require
from blip3o_jax.models import blip3o
from blip3o_jax.models.decoder import Cache, DecodeWeights
from blip3o_jax.nn.linear import row_logits
from blip3o_jax.nn.truncation import keep_likeliest
from blip3o_jax.types import Params


class GreedyOr(Range):
    """0 for greedy, or a range."""

    def check(self, value: float, where: str) -> None:
        """Raises UserError for a number outside."""
        if value != 0:
            require(self.low <= value <= self.high, where, value, f"0 (greedy) or {self.low:g} to {self.high:g}")


Temperature = Annotated[float, GreedyOr(1e-4, 1e4)]
TopK = Annotated[int, Range(0, 2**31 - 1)]
TopP = Annotated[float, Range(1e-6, 1)]


@dataclasses.dataclass(frozen=True)
class TokenSampling:
    """How the next token is drawn: temperature, then top-k, then top-p."""

    temperature: Temperature = 1.0  # 0 is greedy
    top_k: TopK = 1200  # 0 keeps all
    top_p: TopP = 0.95  # 1 keeps all
    image_ids_only: bool = True  # False samples from the whole vocabulary, as the reference does


@flax.struct.dataclass
class Decoding:
    """A decoding under way. Entries beyond `step` are zeros."""

    step: jax.Array  # i32[], tokens decoded so far
    cache: Cache
    weights: DecodeWeights
    keys: jax.Array  # key[B]
    tokens: jax.Array  # i32[B N], vocabulary ids
    log_probs: jax.Array  # f32[B N], of the tokens under the distribution they were drawn from
    hidden: jax.Array  # dtype[B 1+N D], of the prompt's last position and of every token
    guidance_scale: jax.Array | None = None  # f32[B]; None: no guidance
    unguided: jax.Array | None = None  # dtype[B D], last hidden states of the same rows without their text


def start(
    config: Blip3oConfig,
    params: Params,
    embeddings: jax.Array,
    valid: jax.Array,
    keys: jax.Array,
    sampling: TokenSampling,
    num_tokens: int,
    guidance_scale: jax.Array | None = None,
) -> Decoding:
    """Reads prompts and makes room for `num_tokens` tokens of every sample.

    Args:
      embeddings: [P T D] of prompts that end in the scale token, padded on the left; with guidance [2P T D], the
        second half the same prompts without their text.
      valid: bool of embeddings' first two axes, False for padding.
      keys: key[B], B a multiple of P; rows of one prompt follow each other.
      guidance_scale: f32[B], 1 for the distribution of the prompts themselves; None: there is no second half.
    """
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    slots = embeddings.shape[1] + num_tokens
    hidden, cache = blip3o.apply(config, params, "decoder", "prefill", embeddings, positions, valid, slots)
    rows, halves = keys.shape[0], 1 if guidance_scale is None else 2
    samples = halves * rows // embeddings.shape[0]
    last, *unguided = jnp.split(jnp.repeat(hidden[:, -1], samples, axis=0), halves)
    kept = jnp.zeros((rows, 1 + num_tokens, last.shape[-1]), last.dtype).at[:, 0].set(last)
    empty = jnp.zeros((rows, num_tokens))
    weights = blip3o.apply(config, params, "decoder", "decode_weights", *vocabulary(config, sampling))
    return Decoding(
        jnp.int32(0), cache.repeat(samples), weights, keys, empty.astype(jnp.int32), empty, kept, guidance_scale,
        *unguided,
    )  # fmt: skip


def advance(
    config: Blip3oConfig, params: Params, decoding: Decoding, sampling: TokenSampling, stop: jax.Array
) -> Decoding:
    """Decodes up to token `stop` (i32[], traced: one compiled program serves any stretch)."""

    def body(step, state: Decoding):
        hidden = jax.lax.dynamic_index_in_dim(state.hidden, step, axis=1, keepdims=False)
        keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, step)
        logits = row_logits(hidden, weights.head)
        if guided:
            base = row_logits(state.unguided, weights.head)
            logits = guidance.extrapolate(base, logits, state.guidance_scale[:, None])
        tokens, log_probs = sample_token(logits, keys, sampling)
        tokens += vocabulary(config, sampling)[0]
        embedded = blip3o.apply(config, params, "decoder", "embed_tokens", jnp.tile(tokens, 1 + guided))
        hidden, cache = blip3o.apply(config, params, "decoder", "decode", embedded, state.cache, weights)
        hidden, *unguided = jnp.split(hidden, 1 + guided)
        return state.replace(
            unguided=unguided[0] if guided else None,
            step=step + 1,
            cache=cache,
            tokens=jax.lax.dynamic_update_index_in_dim(state.tokens, tokens, step, 1),
            log_probs=jax.lax.dynamic_update_index_in_dim(state.log_probs, log_probs, step, 1),
            hidden=jax.lax.dynamic_update_index_in_dim(state.hidden, hidden.astype(state.hidden.dtype), step + 1, 1),
        )

    weights, guided = decoding.weights, decoding.guidance_scale is not None
    decoding = jax.lax.fori_loop(decoding.step, stop, body, decoding.replace(weights=None))
    return decoding.replace(weights=weights)


def vocabulary(config: Blip3oConfig, sampling: TokenSampling) -> tuple[int, int | None]:
    """First id and number of the tokens that are sampled from; None: all from there on."""
    return (config.tokens.image_start, config.tokens.num_image_tokens) if sampling.image_ids_only else (0, None)


def truncate(logits: jax.Array, sampling: TokenSampling) -> jax.Array:
    """The logits f32[... V] of the distribution that is sampled from: temperature, top-k, top-p; the rest at -inf."""
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
    return keep_likeliest(logits, sampling.top_k, sampling.top_p)


def sample_token(logits: jax.Array, keys: jax.Array, sampling: TokenSampling) -> tuple[jax.Array, jax.Array]:
    """Draws a token for every row of the batch.

    Args:
      logits: f32[B V].
      keys: key[B].

    Returns:
      i32[B] of V, f32[B] log-probabilities; greedy decoding has those of temperature 1 without truncation.
    """
    if sampling.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        logits = truncate(logits, sampling)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
        tokens = jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)
