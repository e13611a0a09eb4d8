"""Autoregressive decoding of image tokens: one prefill per prompt, then a cached loop.

P prompts, B = P * samples rows, T prompt positions, N tokens to decode, D decoder width, V rows of the head.

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

import flax.struct
import jax
import jax.numpy as jnp

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.models import blip3o
from blip3o_jax.models.decoder import Cache, DecodeWeights
from blip3o_jax.nn.linear import row_logits
from blip3o_jax.types import Params


@dataclasses.dataclass(frozen=True)
class TokenSampling:
    """How the next token is drawn: temperature, then top-k, then top-p."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 1200  # 0 keeps all
    top_p: float = 0.95  # in (0, 1]; 1 keeps all
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
    hidden: jax.Array  # dtype[B 1+N D], states of the prompt's last position and of every token
    guidance_scale: jax.Array | None = None  # f32[B]; None: no guidance
    unguided: jax.Array | None = None  # dtype[B D], last states of the same rows without their text


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
    states = jnp.zeros((rows, 1 + num_tokens, last.shape[-1]), last.dtype).at[:, 0].set(last)
    empty = jnp.zeros((rows, num_tokens))
    size = config.tokens.num_image_tokens if sampling.image_ids_only else None
    weights = blip3o.apply(config, params, "decoder", "decode_weights", first_row(config, sampling), size)
    return Decoding(
        jnp.int32(0), cache.repeat(samples), weights, keys, empty.astype(jnp.int32), empty, states, guidance_scale,
        *unguided,
    )  # fmt: skip


def advance(
    config: Blip3oConfig, params: Params, decoding: Decoding, sampling: TokenSampling, stop: jax.Array
) -> Decoding:
    """Decodes up to token `stop` (i32[], traced: one compiled program serves any stretch)."""

    def body(step, state: Decoding):
        states = jax.lax.dynamic_index_in_dim(state.hidden, step, axis=1, keepdims=False)
        keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, step)
        logits = row_logits(states, weights.head)
        if guided:
            without = row_logits(state.unguided, weights.head)
            scale = state.guidance_scale[:, None]
            logits = jnp.where(scale == 1, logits, without + scale * (logits - without))
        rows, log_probs = sample_token(logits, keys, sampling)
        tokens = rows + first_row(config, sampling)
        embedded = blip3o.apply(config, params, "decoder", "embed_tokens", jnp.tile(tokens, 1 + guided))
        states, cache = blip3o.apply(config, params, "decoder", "decode", embedded, state.cache, weights)
        states, *unguided = jnp.split(states, 1 + guided)
        return state.replace(
            unguided=unguided[0] if guided else None,
            step=step + 1,
            cache=cache,
            tokens=jax.lax.dynamic_update_index_in_dim(state.tokens, tokens, step, 1),
            log_probs=jax.lax.dynamic_update_index_in_dim(state.log_probs, log_probs, step, 1),
            hidden=jax.lax.dynamic_update_index_in_dim(state.hidden, states.astype(state.hidden.dtype), step + 1, 1),
        )

    weights, guided = decoding.weights, decoding.guidance_scale is not None
    decoding = jax.lax.fori_loop(decoding.step, stop, body, decoding.replace(weights=None))
    return decoding.replace(weights=weights)


def generate(
    config: Blip3oConfig,
    params: Params,
    embeddings: jax.Array,
    valid: jax.Array,
    keys: jax.Array,
    sampling: TokenSampling,
) -> Decoding:
    """Prefill and the whole loop as one jittable function; arguments as in `start` and `advance`."""
    decoding = start(config, params, embeddings, valid, keys, sampling, config.num_image_tokens)
    return advance(config, params, decoding, sampling, jnp.int32(config.num_image_tokens))


def first_row(config: Blip3oConfig, sampling: TokenSampling) -> int:
    """Vocabulary id of the first row of the head that is sampled from."""
    return config.tokens.image_start if sampling.image_ids_only else 0


def truncate(logits: jax.Array, sampling: TokenSampling) -> jax.Array:
    """The logits of the distribution that is sampled from: temperature, top-k, top-p; the rest at -inf.

    Ties with the k-th largest logit are kept, as transformers keeps them.

    Args:
      logits: f32[... V].
    """
    if sampling.temperature > 0:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = _keep_largest(logits, jnp.ones_like(logits), sampling.top_k)
    if sampling.top_p < 1:
        logits = _keep_largest(logits, jax.nn.softmax(logits, axis=-1), sampling.top_p)
    return logits


def _keep_largest(logits: jax.Array, weights: jax.Array, total: float) -> jax.Array:
    """f32[... V], -inf but for the fewest largest logits whose weights f32[... V] add up to `total`.

    The smallest logit kept is found bit by bit: sorting takes twenty times as long on CPU.
    """
    logits, weights = jnp.where(logits == 0, 0.0, logits), jax.lax.stop_gradient(weights)  # -0.0 ties with 0.0
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(logits), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    rank = jnp.where(bits < sign, bits | sign, ~bits)  # ordered as the logits are

    def decide(step, least):
        candidate = least | sign >> step
        reached = jnp.sum(jnp.where(rank >= candidate[..., None], weights, 0.0), axis=-1) >= total
        return jnp.where(reached, candidate, least)

    least = jax.lax.fori_loop(jnp.uint32(0), jnp.uint32(32), decide, jnp.zeros(logits.shape[:-1], jnp.uint32))
    return jnp.where(rank >= least[..., None], logits, -jnp.inf)


def sample_token(logits: jax.Array, keys: jax.Array, sampling: TokenSampling) -> tuple[jax.Array, jax.Array]:
    """Draws one row of the head per row of the batch.

    Args:
      logits: f32[B V].
      keys: key[B].

    Returns:
      i32[B] rows, f32[B] their log-probabilities; greedy decoding has those of temperature 1 without truncation.
    """
    if sampling.temperature == 0:
        rows = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        logits = truncate(logits, sampling)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
        rows = jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)
    return rows, token_log_probs(logits, rows)


def token_log_probs(logits: jax.Array, rows: jax.Array) -> jax.Array:
    """f32[...] log-probabilities of `rows` i32[...] under logits f32[... V]."""
    chosen = jnp.take_along_axis(logits, rows[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
