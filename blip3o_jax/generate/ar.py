"""Autoregressive decoding of image tokens: one prefill per prompt, then a loop over a key-value cache.

P prompts, B = P * samples rows, T prompt positions, N tokens to decode, W window size, D decoder width, V sampled
vocabulary.

Source: BLIP3o-NEXT `generate_images` (its first half), transformers `GenerationMixin` (order of the logits warpers).
Differs from the reference:
1. The decoding loop keeps the hidden states that condition the DiT; the reference runs a second forward pass without a
   cache and without the padding mask.
2. By default only image ids are sampled (`image_ids_only`), and only their rows of the head are computed.
3. Every row has its own key, so its tokens do not depend on the rest of the batch.
4. Log-probabilities are those of the sampling distribution, including truncation.
5. Optional classifier-free guidance of the tokens (arXiv 2406.06525).
6. A decoder pass may decode several tokens (Jacobi iteration under fixed noise, as in arXiv 2410.01699).
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
from blip3o_jax.nn.kernels import largest
from blip3o_jax.nn.linear import row_logits
from blip3o_jax.nn.truncation import keep_likeliest
from blip3o_jax.nn.window import read_window, write_window
from blip3o_jax.sharding import constrain
from blip3o_jax.types import Params


class GreedyOr(Range):
    """Either 0, for greedy decoding, or a number within bounds."""

    def check(self, value: float, where: str) -> None:
        """Raises UserError unless the value is 0 or within the bounds."""
        if value != 0:
            require(self.low <= value <= self.high, where, value, f"0 (greedy) or {self.low:g} to {self.high:g}")


Temperature = Annotated[float, GreedyOr(1e-4, 1e4)]
TopK = Annotated[int, Range(0, 2**31 - 1)]
TopP = Annotated[float, Range(1e-6, 1)]


@dataclasses.dataclass(frozen=True)
class TokenSampling:
    """Token sampling settings, applied in the order temperature, top-k, top-p."""

    temperature: Temperature = 1.0  # 0 is greedy
    top_k: TopK = 1200  # 0 keeps all
    top_p: TopP = 0.95  # 1 keeps all
    image_ids_only: bool = True  # False samples from the whole vocabulary, as the reference does


@flax.struct.dataclass
class Decoding:
    """The state of the decoding loop. Token entries beyond `step` are guesses."""

    step: jax.Array  # tokens decoded so far: i32[], or i32[B] with a window, where rows advance independently
    cache: Cache
    weights: DecodeWeights
    keys: jax.Array  # key[B]
    tokens: jax.Array  # i32[B N], vocabulary ids
    log_probs: jax.Array  # f32[B N], under the sampling distribution
    hidden: jax.Array  # dtype[B 1+N D], states of the prompt's last position and of every token
    passes: jax.Array  # i32[B], decoder passes used
    guidance_scale: jax.Array | None = None  # f32[B]; None: no guidance
    base: jax.Array | None = None  # like `hidden`, of the unconditional half; None: no guidance
    window: int = flax.struct.field(pytree_node=False, default=1)  # W


def start(
    config: Blip3oConfig,
    params: Params,
    embeddings: jax.Array,
    valid: jax.Array,
    keys: jax.Array,
    sampling: TokenSampling,
    num_tokens: int,
    guidance_scale: jax.Array | None = None,
    window: int = 1,
) -> Decoding:
    """Prefills prompts, allocates the cache for `num_tokens` tokens per sample and draws the first token.

    Args:
      config, params: the model.
      embeddings: [P T D], left-padded prompts that end in the scale token; with guidance [2P T D], the second half
        holding the same prompts without their text.
      valid: bool, the first two axes of `embeddings`; False for padding.
      keys: key[B], B a multiple of P; the rows of a prompt are adjacent.
      sampling: temperature and truncation.
      num_tokens: N.
      guidance_scale: f32[B], 1 for no guidance of a row; None if `embeddings` has no unconditional half.
      window: W, tokens that a decoder pass may decode, 1 to `num_tokens`.
    """
    positions = jnp.cumsum(valid, axis=1) - 1  # those of padding have no effect
    slots = embeddings.shape[1] + num_tokens
    hidden, cache = blip3o.apply(config, params, "decoder", "prefill", embeddings, positions, valid, slots)
    rows, halves = keys.shape[0], 1 if guidance_scale is None else 2
    samples = halves * rows // embeddings.shape[0]
    last = constrain(jnp.repeat(hidden[:, -1:], samples, axis=0), "batch", "length", "act_embed")
    weights = blip3o.decode_weights(config, params, *vocabulary(config, sampling))
    step = jnp.zeros((rows,) if window > 1 else (), jnp.int32)
    tokens, log_probs = _draw(config, weights.head, last, keys, step, sampling, guidance_scale)
    kept = jnp.zeros((rows, 1 + num_tokens, last.shape[-1]), last.dtype)
    kept, base = (kept.at[:, :1].set(half) for half in (last[:rows], last[-rows:]))
    tokens, log_probs = (jnp.repeat(drawn, num_tokens, axis=1) for drawn in (tokens, log_probs))
    passes = jnp.zeros(rows, jnp.int32)
    cache = cache.repeat(samples)
    base = base if halves == 2 else None
    return Decoding(step, cache, weights, keys, tokens, log_probs, kept, passes, guidance_scale, base, window)


def advance(
    config: Blip3oConfig, params: Params, decoding: Decoding, sampling: TokenSampling, stop: jax.Array
) -> Decoding:
    """Decodes every row up to token `stop` (i32[], traced); with a window some rows advance further.

    A pass runs the decoder on W tokens of every row: the last accepted one, then guesses. A token drawn with the random
    numbers of its position is accepted if all tokens before it were guessed correctly; otherwise it becomes the guess
    of the next pass. The result therefore equals that of a window of 1, which makes no guesses.
    """

    def body(state: Decoding) -> Decoding:
        first = jnp.minimum(state.step, total - window)
        ids = read_window(state.tokens, first, window)
        embedded = blip3o.apply(config, params, "decoder", "embed_tokens", jnp.tile(ids, (halves, 1)))
        slot = prompt + (jnp.tile(first, halves) if window > 1 else first)
        hidden, cache = blip3o.apply(config, params, "decoder", "decode", embedded, state.cache, weights, slot)
        drawn = _draw(config, weights.head, hidden, state.keys, first + 1, sampling, state.guidance_scale)
        step, tokens, log_probs = first + 1, *drawn
        if window > 1:
            old = (read_window(array, first + 1, window) for array in (state.tokens, state.log_probs))
            certain = step[:, None] + jnp.arange(window) <= state.step[:, None]
            tokens, log_probs = (jnp.where(certain, *both) for both in zip(old, drawn, strict=True))
            right = tokens[:, :-1] == ids[:, 1:]
            step += jnp.cumprod(right, axis=1).sum(axis=1)
            unseen = jnp.repeat(tokens[:, -1:], window - 1, axis=1)  # guess that the last token repeats
            tokens = jnp.concatenate([tokens, unseen], axis=1)
        return state.replace(
            step=step,
            cache=cache,
            tokens=write_window(state.tokens, tokens, first + 1),
            log_probs=write_window(state.log_probs, log_probs, first + 1),
            hidden=write_window(state.hidden, hidden[: len(ids)], first + 1),
            base=None if halves == 1 else write_window(state.base, hidden[len(ids) :], first + 1),
            passes=state.passes + (state.step < total),
        )

    weights, window, total = decoding.weights, decoding.window, decoding.tokens.shape[1]
    halves, prompt = 1 if decoding.guidance_scale is None else 2, decoding.cache.valid.shape[1] - total
    room = (jnp.pad(array, ((0, 0), (0, window))) for array in (decoding.tokens, decoding.log_probs))  # beyond N
    state = decoding.replace(weights=None, **dict(zip(("tokens", "log_probs"), room, strict=True)))
    state = jax.lax.while_loop(lambda state: state.step.min() < stop, body, state)
    return state.replace(weights=weights, tokens=state.tokens[:, :total], log_probs=state.log_probs[:, :total])


def _draw(
    config: Blip3oConfig,
    head: jax.Array,
    hidden: jax.Array,
    keys: jax.Array,
    step: jax.Array,
    sampling: TokenSampling,
    guidance_scale: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Draws tokens i32[B W] and returns them with their log-probabilities f32[B W].

    Args:
      config: the model.
      head: dtype[V D].
      hidden: dtype[B W D], states of the preceding tokens; with guidance [2B W D].
      keys: key[B].
      step: index of the first token, i32[] or i32[B].
      sampling: temperature and truncation.
      guidance_scale: f32[B] or None, see `start`.
    """
    logits, first = row_logits(hidden, head), vocabulary(config, sampling)[0]
    if guidance_scale is not None:
        logits, base = jnp.split(logits, 2)
        logits = guidance.extrapolate(base, logits, guidance_scale[:, None, None])
    rows, window, size = logits.shape
    steps = jnp.broadcast_to(step, rows)[:, None] + jnp.arange(window)
    keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, steps)
    tokens, log_probs = sample_token(logits.reshape(-1, size), keys.reshape(-1), sampling)
    return tokens.reshape(rows, window) + first, log_probs.reshape(rows, window)


def vocabulary(config: Blip3oConfig, sampling: TokenSampling) -> tuple[int, int | None]:
    """Returns the first id and the number of sampled tokens; None for all from the first on."""
    return (config.tokens.image_start, config.tokens.num_image_tokens) if sampling.image_ids_only else (0, None)


def truncate(logits: jax.Array, sampling: TokenSampling) -> jax.Array:
    """Applies temperature (not 0), top-k and top-p to logits f32[... V]; dropped tokens get -inf."""
    return keep_likeliest(logits / sampling.temperature, sampling.top_k, sampling.top_p)


def sample_token(logits: jax.Array, keys: jax.Array, sampling: TokenSampling) -> tuple[jax.Array, jax.Array]:
    """Draws one token per row.

    Args:
      logits: f32[B V].
      keys: key[B].
      sampling: temperature and truncation.

    Returns:
      Indices i32[B] in [0, V), and log-probabilities f32[B]: with greedy decoding those of temperature 1, untruncated.
    """
    if sampling.temperature == 0:
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    else:
        logits = truncate(logits, sampling)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
        tokens = largest(logits + noise)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)
