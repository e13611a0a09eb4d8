"""The compiled programs that a picture passes through, one of each per configuration and shape.

P prompts, B = P * samples pictures, T positions, I images of a row (target, then references), N image tokens.
Everything here is `jax.jit` of a pure function of (config, params, inputs); `pipeline.py` runs them in order.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.generate import ar, image, scoring
from blip3o_jax.models import blip3o
from blip3o_jax.types import Params

TOKEN_STREAM, NOISE_STREAM, NEGATIVE_STREAM = 0, 1, 2  # independent random numbers of one picture


def picture_keys(seeds: Sequence[int], samples: range) -> jax.Array:
    """key[P * samples]: sample s of a prompt has the key of (its seed, s), whatever the batch around it."""
    keys = jax.vmap(jax.random.key)(np.array(seeds, np.uint32))
    numbers = np.arange(samples.start, samples.stop)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys, numbers).reshape(-1)


@functools.partial(jax.jit, static_argnames="config")
def codebook(config: Blip3oConfig, params: Params) -> jax.Array:
    """The image tokenizer's effective codebook f32[Q E]."""
    return blip3o.apply(config, params, "image_tokenizer", "codebook")


@functools.partial(jax.jit, static_argnames=("config", "sampling"))
def prefill(
    config: Blip3oConfig,
    params: Params,
    tokens: jax.Array,
    image_slot: jax.Array,
    valid: jax.Array,
    codes: jax.Array,
    features: jax.Array | None,
    keys: jax.Array,
    stream: jax.Array,
    sampling: ar.TokenSampling,
    guidance_scale: jax.Array | None = None,
) -> ar.Decoding:
    """Reads prompts.

    Args:
      tokens, image_slot, codes, features: rows of P prompts, as for `blip3o.embed_sequence`; with guidance 2P.
      valid: bool[P T], False for padding.
      keys: key[B] of the pictures.
      stream: i32[], which of a picture's random numbers the tokens are drawn with.
      guidance_scale: f32[B] or None, see `ar.start`.
    """
    embeddings, _ = blip3o.embed_sequence(config, params, tokens, image_slot, codes, features)
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, stream)
    return ar.start(config, params, embeddings, valid, keys, sampling, config.num_image_tokens, guidance_scale)


@functools.partial(jax.jit, static_argnames="config")
def read_states(
    config: Blip3oConfig,
    params: Params,
    tokens: jax.Array,
    image_slot: jax.Array,
    valid: jax.Array,
    window_start: jax.Array,
    codes: jax.Array,
    features: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Vocabulary ids i32[P N] and states [P 1+N D] of targets whose codes are given; arguments as in `prefill`."""
    embeddings, _ = blip3o.embed_sequence(config, params, tokens, image_slot, codes, features)
    positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0)
    hidden = blip3o.apply(config, params, "decoder", "__call__", embeddings, positions, valid)
    return codes[:, 0] + config.tokens.image_start, blip3o.condition_window(config, hidden, window_start)


@functools.partial(jax.jit, static_argnames=("config", "guided", "size"))
def start_canvas(
    config: Blip3oConfig,
    params: Params,
    states: jax.Array,
    ref_latent: jax.Array | None,
    has_ref: jax.Array | None,
    guidance_scale: jax.Array,
    negative_states: jax.Array | None,
    keys: jax.Array,
    guided: bool,
    size: tuple[int, int],
) -> image.Canvas:
    """Noise of `size` (height, width in pixels) under the pictures' keys; other arguments as in `image.start`."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, NOISE_STREAM)
    latents = image.noise(config, keys, *size)
    return image.start(config, params, states, latents, ref_latent, has_ref, guidance_scale, negative_states, guided)


@functools.partial(jax.jit, static_argnames="config")
def round_trip(config: Blip3oConfig, params: Params, pixels: jax.Array) -> jax.Array:
    """Pixels f32[B Y X 3] through the autoencoder and back."""
    return blip3o.decode_latent(config, params, blip3o.encode_latent(config, params, pixels))


advance_tokens = jax.jit(ar.advance, static_argnames=("config", "sampling"), donate_argnames="decoding")
advance_canvas = jax.jit(image.advance, static_argnames=("config", "settings"), donate_argnames="canvas")
encode_tokens = jax.jit(blip3o.encode_tokens, static_argnames="config")
encode_latent = jax.jit(blip3o.encode_latent, static_argnames="config")
decode_latent = jax.jit(blip3o.decode_latent, static_argnames="config")
completion_log_probs = jax.jit(
    scoring.completion_log_probs, static_argnames=("config", "sampling", "chunk", "prompt_rows")
)
