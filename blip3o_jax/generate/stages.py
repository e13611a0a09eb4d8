"""The compiled programs of generation, each `jax.jit` of a pure function of (config, params, inputs).

P prompts, B = P * samples images, T positions, I images of a row (target, then references), N image tokens.
`engine.py` runs them in order.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax import compilation
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.generate import ar, paint, scoring
from blip3o_jax.generate.prompts import PromptRows, Reference
from blip3o_jax.models import blip3o
from blip3o_jax.types import Params

TOKEN_STREAM, NOISE_STREAM, NEGATIVE_STREAM, STEP_STREAM, MATCHING_STREAM = range(5)
"""Independent random streams of one image's key."""

MEGAPIXEL = 2**20  # the autoencoder's activations of so many pixels take about 1 GB in bfloat16


def image_keys(seeds: Sequence[int], samples: Sequence[int], firsts: Sequence[int] | None = None) -> jax.Array:
    """Returns key[P * samples]: the key of a sample depends on its seed and number only, not on the batch.

    Args:
      seeds: P seeds in [0, 2**32).
      samples: sample numbers of every prompt.
      firsts: P offsets added to the sample numbers; default 0.
    """
    numbers = np.array([0] * len(seeds) if firsts is None else firsts)[:, None] + np.array(samples)
    return compilation.run(_numbered_keys, np.array(seeds, np.uint32), numbers)


@jax.jit
def _numbered_keys(seeds: jax.Array, numbers: jax.Array) -> jax.Array:
    keys = jax.vmap(jax.random.key)(seeds)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, numbers).reshape(-1)


def stream_of(keys: jax.Array, stream: jax.Array | int) -> jax.Array:
    """Returns key[B] of one random stream of image keys [B]."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, stream)


@functools.partial(jax.jit, static_argnames="config")
def codebook(config: Blip3oConfig, params: Params) -> jax.Array:
    """Returns the image tokenizer's effective codebook f32[Q E]."""
    return blip3o.apply(config, params, "image_tokenizer", "codebook")


@functools.partial(jax.jit, static_argnames="config")
def encode_images(
    config: Blip3oConfig, params: Params, pixels: jax.Array, codebook: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Encodes tokenizer pixels f32[P I S S 3] to codes i32[P I N], and to features f32[P I-1 N F] if used."""
    codes, features = blip3o.encode_tokens(config, params, pixels, codebook)
    return codes, features[:, 1:] if config.edit.siglip_features and pixels.shape[1] > 1 else None


@functools.partial(jax.jit, static_argnames=("config", "sampling", "window"))
def prefill(
    config: Blip3oConfig,
    params: Params,
    rows: PromptRows,
    keys: jax.Array,
    stream: jax.Array,
    sampling: ar.TokenSampling,
    window: int = 1,
) -> ar.Decoding:
    """Prefills the decoder with prompts and draws the first token of every image.

    Args:
      rows: the prompts; with guidance, including their unconditional half.
      keys: key[B] of the images.
      stream: i32[], random stream to draw tokens from.
      sampling: temperature and truncation.
      window: tokens per decoder pass, see `ar.start`.
    """
    scale, samples = rows.token_guidance_scale, len(keys) // len(rows.codes)
    scale = None if scale is None else jnp.repeat(scale, samples)
    inputs = _embed(config, params, rows), rows.valid, stream_of(keys, stream)
    return ar.start(config, params, *inputs, sampling, config.num_image_tokens, scale, window)


@functools.partial(jax.jit, static_argnames="config")
def read_targets(
    config: Blip3oConfig, params: Params, rows: PromptRows, window_start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns tokens i32[P N] and hidden states [P 1+N D] of given targets.

    Args:
      rows: prompts followed by their targets.
      window_start: i32[P], position of the scale token.
    """
    positions = jnp.cumsum(rows.valid, axis=1) - 1  # those of padding have no effect
    embeddings = _embed(config, params, rows)
    hidden = blip3o.apply(config, params, "decoder", "__call__", embeddings, positions, rows.valid)
    return rows.codes[:, 0] + config.tokens.image_start, blip3o.condition_window(config, hidden, window_start)


def _embed(config: Blip3oConfig, params: Params, rows: PromptRows) -> jax.Array:
    """Returns embeddings [P T D], or [2P T D] with guidance."""
    halves = len(rows.tokens) // len(rows.codes)
    codes, features = jax.tree.map(lambda x: jnp.concatenate([x] * halves), (rows.codes, rows.features))
    return blip3o.embed_sequence(config, params, rows.tokens, rows.image_slot, codes, features)[0]


@functools.partial(jax.jit, static_argnames=("config", "settings", "size"))
def start_canvas(
    config: Blip3oConfig,
    params: Params,
    hidden: jax.Array,
    keys: jax.Array,
    settings: paint.Denoising,
    size: tuple[int, int],
    reference: Reference | None,
    guidance_scale: jax.Array | None,
    negative: jax.Array | None = None,
) -> paint.Canvas:
    """Starts denoising from noise for images of `size` (height, width in pixels); otherwise as `paint.start`."""
    latents, keys = paint.noise(config, stream_of(keys, NOISE_STREAM), *size), stream_of(keys, STEP_STREAM)
    return paint.start(config, params, hidden, latents, keys, settings, reference, guidance_scale, negative)


@functools.partial(jax.jit, static_argnames="config")
def round_trip(config: Blip3oConfig, params: Params, pixels: jax.Array) -> jax.Array:
    """Encodes and decodes pixels f32[B Y X 3] with the autoencoder."""
    return blip3o.decode_latent(config, params, blip3o.encode_latent(config, params, pixels))


@functools.partial(jax.jit, static_argnames="config")
def encode_latent(config: Blip3oConfig, params: Params, pixels: jax.Array) -> jax.Array:
    """Encodes pixels f32[B Y X 3] in [-1, 1] to scaled latents f32[B y x C], about a megapixel per device at a time."""
    at_a_time = max(1, MEGAPIXEL // (pixels.shape[1] * pixels.shape[2]))
    return blip3o.encode_latent(config, params, pixels, at_a_time)


@functools.partial(jax.jit, static_argnames="config")
def decode_latent(config: Blip3oConfig, params: Params, latent: jax.Array) -> jax.Array:
    """Decodes scaled latents f32[B y x C] to pixels f32[B Y X 3], about a megapixel per device at a time."""
    pixels = latent.shape[1] * latent.shape[2] * config.autoencoder.spatial_factor**2
    return blip3o.decode_latent(config, params, latent, max(1, MEGAPIXEL // pixels))


advance_tokens = jax.jit(ar.advance, static_argnames=("config", "sampling"), donate_argnames="decoding")
advance_canvas = jax.jit(paint.advance, static_argnames=("config", "settings"), donate_argnames="canvas")
completion_hidden = jax.jit(scoring.completion_hidden, static_argnames="config")
completion_log_probs = jax.jit(scoring.completion_log_probs, static_argnames=("config", "sampling", "chunk"))
