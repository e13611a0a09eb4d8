"""Joint cross-entropy on tokens and flow matching on latents, for pretraining, fine-tuning and editing.

A batch may mix text-to-image, editing and reconstruction rows; all run in one compiled step.

B rows, T positions, R references, N codes of an image, M = 1 + N hidden states that condition the DiT, D decoder width,
y x latent cells, C latent channels, K noise draws per row.

Source: BLIP3o-NEXT `blip3oQwenForCausalLM.forward` (both branches).
Differs from the reference:
1. The DiT is conditioned on the hidden states of the image span; `window="tail"` takes the last M of the row, as the
   reference does.
2. Dropped rows use the null condition of sampling.
3. Rows without a reference may share a batch with editing rows: their reference latent is zero.
4. Noise levels, latents and the loss stay in float32.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax import flops
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.schema import Count, Natural, OneOf, Range, Share, Weight
from blip3o_jax.diffusion import flow
from blip3o_jax.errors import require
from blip3o_jax.generate import stages
from blip3o_jax.models import blip3o
from blip3o_jax.objectives.cross_entropy import chunked_cross_entropy
from blip3o_jax.objectives.objective import Objective
from blip3o_jax.train.step import LossTerm
from blip3o_jax.types import Batch, Metrics, Params

CODES_STREAM, CHOICE_STREAM, NOISE_STREAMS = 3, 4, 5
"""Numbers folded into a row's key for independent random streams; the split in `draw_flow` uses 0 to 2. The noises of
draws after the first use the numbers from NOISE_STREAMS on."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Weights and variants of the joint objective."""

    ce_weight: Weight = 1.0
    flow_weight: Weight = 1.0
    condition_dropout: Share = 0.1  # fraction of rows trained on the null condition
    flow_draws: Annotated[int, Range(1, 256)] = 1  # K, evenly spaced noise levels per image, on one decoder pass
    flow_every: Annotated[int, Range(1, 2**16)] = 1  # flow matching trains on one of this many rows of a micro-batch,
    # so that the decoder can use larger batches
    window: Annotated[str, OneOf("span", "tail")] = "span"  # hidden states that condition the DiT
    stochastic_codes: bool = False  # sample the target's codes at the tokenizer's temperature, as the reference does
    encode_rows: Natural = 0  # rows per device that the frozen encoders process at a time, to save memory; 0: all
    ce_chunk: Count = 128  # positions whose logits are in memory at a time


@flax.struct.dataclass
class FlowDraw:
    """Random numbers of flow matching; the K*B rows are ordered by draw, then by row."""

    u: jax.Array  # f32[K*B] in [0, 1), selects the noise level
    noise: jax.Array  # f32[K*B y x C]
    drop: jax.Array  # bool[B], rows with the null condition


def make(model: Blip3oConfig, settings: Settings) -> Callable:
    """Returns the loss function; parameters: those of the model."""

    def loss(params: Params, batch: Batch, keys: jax.Array) -> tuple[dict[str, LossTerm], Metrics]:
        code_keys = stages.stream_of(keys, CODES_STREAM) if settings.stochastic_codes else None
        codes, features = encode_codes(model, params, batch, code_keys, settings.encode_rows)
        hidden, ids = read(model, params, batch, codes, features)
        ce, correct = token_loss(model, params, batch, hidden, ids, settings.ce_chunk)
        states = blip3o.condition_window(model, hidden, batch.window_start, settings.window)
        some, states, flow_keys = one_of_every(settings.flow_every, keys, (batch, states, keys))
        latent, ref_latent, has_ref = encode_latents(model, params, some, settings.encode_rows)
        draw = draw_flow(flow_keys, latent.shape[1:], settings.condition_dropout, settings.flow_draws)
        error = flow_errors(model, params, states, latent, ref_latent, has_ref, draw)
        terms = {
            "ce": ce._replace(coefficient=settings.ce_weight),
            "flow": LossTerm(error.sum(), jnp.float32(error.shape[0]), settings.flow_weight),
        }
        one, tokens = jnp.float32(1), batch.length.sum().astype(jnp.float32)
        images = (jnp.float32(ids.shape[0]), one)
        return terms, {"accuracy": (correct, ce.weight), "images": images, "tokens": (tokens, one)}

    return loss


def fields(model: Blip3oConfig, max_references: int, precomputed: bool) -> tuple[str, ...]:
    """Returns the optional fields of `types.Batch` that the loss reads, for rows with at most R references.

    `precomputed` rows hold codes and latents instead of pixels.
    """
    names = ["target_codes", "target_latent"] if precomputed else ["target_tokenizer_pixels", "target_pixels"]
    if max_references:
        names.append("ref_codes" if precomputed and not model.edit.siglip_features else "ref_tokenizer_pixels")
        if model.edit.vae_condition or model.edit.vae_noise:
            names.append("ref_latent" if precomputed else "ref_pixels")
    return tuple(names)


def flops_per_step(model: Blip3oConfig, settings: Settings, layout: Any, rows: int, trainable: Params) -> float:
    """Counts one update over all rows."""
    return flops.training_step(model, layout, rows, trainable, settings.flow_draws, settings.flow_every)


def encode_codes(
    model: Blip3oConfig, params: Params, batch: Batch, keys: jax.Array | None = None, at_a_time: int = 0
) -> tuple[jax.Array, jax.Array | None]:
    """Returns codes i32[B 1+R N] of target and references, and features [B R N F] of the references, if used.

    Args:
      keys: key[B], to sample the codes of the target; None: the nearest codes.
      at_a_time: rows per device that are encoded at a time, to save memory; 0: all.
    """
    features = None
    target = batch.target_codes
    if target is None:
        pixels = _needed(batch.target_tokenizer_pixels, "target_tokenizer_pixels")
        target, _ = blip3o.encode_tokens(model, params, pixels, keys=keys, at_a_time=at_a_time)
    images = [target[:, None]]
    if batch.ref_tokenizer_pixels is not None:
        codes, features = blip3o.encode_tokens(model, params, batch.ref_tokenizer_pixels, at_a_time=at_a_time)
        images.append(codes)
    elif batch.ref_codes is not None:
        images.append(batch.ref_codes)
    codes = jnp.concatenate(images, axis=1)
    if features is None or not model.edit.siglip_features:
        return codes, None
    return codes, jax.lax.stop_gradient(features)


def encode_latents(
    model: Blip3oConfig, params: Params, batch: Batch, at_a_time: int = 0
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Returns scaled latents f32[B y x C] of targets and of first references, and bool[B], which rows have a reference.

    The last two are None if the model does not use reference latents. For `at_a_time`, see `encode_codes`.
    """

    def encode(pixels):
        return jax.lax.stop_gradient(blip3o.encode_latent(model, params, pixels, at_a_time))

    latent = batch.target_latent
    if latent is None:
        latent = encode(_needed(batch.target_pixels, "target_pixels"))
    if not (model.edit.vae_condition or model.edit.vae_noise):
        return latent, None, None
    has_ref = batch.ref_mask.any(axis=1)
    reference = batch.ref_latent
    if reference is None and batch.ref_pixels is not None:
        reference = encode(batch.ref_pixels)
    if reference is None:
        reference = jnp.zeros_like(latent)
    return latent, jnp.where(has_ref[:, None, None, None], reference, 0), has_ref


def _needed(images: jax.Array | None, field: str) -> jax.Array:
    """Returns the images of a field of the batch; raises UserError if an objective does not name it in `fields`."""
    require(
        images is not None, "batch", f"no {field}", "images to encode", "name the field in the objective's `fields`"
    )
    return images


def read(
    model: Blip3oConfig, params: Params, batch: Batch, codes: jax.Array, features: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns hidden states dtype[B T D] of rows, and ids i32[B T] that include the image tokens.

    Raises UserError for rows without room for an image.
    """
    length, count = batch.tokens.shape[1], model.num_image_tokens
    require(length > count, "row.length", length, f"more than the {count} tokens of an image, for its text", "raise it")
    embeddings, ids = blip3o.embed_sequence(model, params, batch.tokens, batch.image_slot, codes, features)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    valid = positions < batch.length[:, None]
    return blip3o.apply(model, params, "decoder", "__call__", embeddings, positions, valid), ids


def token_loss(
    model: Blip3oConfig, params: Params, batch: Batch, hidden: jax.Array, ids: jax.Array, chunk: int
) -> tuple[LossTerm, jax.Array]:
    """Computes the next-token cross-entropy over the positions in `batch.loss_mask` from the result of `read`.

    `chunk` positions have their logits in memory at a time. Returns the loss term, and the number f32[] of correct
    predictions.
    """
    rows = blip3o.apply(model, params, "decoder", "head")
    labels = jnp.roll(ids, -1, axis=1)
    weights = jnp.roll(batch.loss_mask, -1, axis=1).at[:, -1].set(False).astype(jnp.float32)
    total, weight, correct = chunked_cross_entropy(hidden, rows, labels, weights, chunk)
    return LossTerm(total, weight), correct


def draw_flow(keys: jax.Array, shape: tuple[int, ...], dropout: float, draws: int = 1) -> FlowDraw:
    """Draws the random numbers of flow matching, each row from its own key.

    Args:
      keys: key[B].
      shape: (y, x, C) of a latent.
      dropout: probability of the null condition.
      draws: K; the noise levels of a row are evenly spaced, see `flow.spread_levels`.
    """

    def row(key):
        level, noise, drop = jax.random.split(key, 3)
        noises = [noise, *(jax.random.fold_in(key, NOISE_STREAMS + i) for i in range(draws - 1))]
        u = flow.spread_levels(level, draws)
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(jnp.stack(noises))
        return u, noise, jax.random.bernoulli(drop, dropout)

    u, noise, drop = jax.vmap(row)(keys)
    u, noise = (x.swapaxes(0, 1).reshape(-1, *x.shape[2:]) for x in (u, noise))
    return FlowDraw(u, noise, drop)


def one_of_every(count: int, keys: jax.Array, rows: Any) -> Any:
    """Selects one random row of every `count` adjacent rows.

    Args:
      count: size of a group; if it does not divide B, the last group is filled up with the first rows.
      keys: key[B]; a group uses that of its first row.
      rows: tree of arrays [B ...].

    Returns:
      Tree of arrays [ceil(B / count) ...].
    """
    if count == 1:
        return rows
    size = keys.shape[0]
    choice = jax.vmap(lambda key: jax.random.randint(key, (), 0, count))(stages.stream_of(keys[::count], CHOICE_STREAM))
    filled = np.arange(choice.size * count) % size

    def choose(x):
        x = x if filled.size == size else x[filled]
        groups = x.reshape(choice.size, count, *x.shape[1:])
        return jax.vmap(lambda group, index: group[index])(groups, choice)

    return jax.tree.map(choose, rows)


def flow_errors(
    model: Blip3oConfig,
    params: Params,
    states: jax.Array,
    latent: jax.Array,
    ref_latent: jax.Array | None,
    has_ref: jax.Array | None,
    draw: FlowDraw,
) -> jax.Array:
    """Returns the mean squared velocity error f32[B] over the K draws of a row.

    Args:
      states: dtype[B M D], hidden states that condition the DiT.
      latent: f32[B y x C], data.
      ref_latent, has_ref: f32[B y x C], reference latents, and bool[B]; None if the model does not use them.
      draw: noise levels, noises and rows without a condition.
    """
    draws = draw.u.shape[0] // latent.shape[0]
    condition = blip3o.make_condition(model, params, states, ref_latent, has_ref)
    condition = blip3o.drop_condition(model, params, condition, draw.drop)
    condition = for_draws(model, params, condition, draws)
    noisy, sigma, target = flow.noisy_example(model.schedule, jnp.tile(latent, (draws, 1, 1, 1)), draw.noise, draw.u)
    velocity = blip3o.velocity(model, params, noisy, sigma, condition, ref_latent)
    return jnp.square(velocity - target).mean(axis=(1, 2, 3)).reshape(draws, -1).mean(axis=0)


def for_draws(model: Blip3oConfig, params: Params, condition: jax.Array, draws: int) -> Any:
    """Returns the condition dtype[B M E] for K*B rows, encoded once for all draws.

    For a single draw it is returned as it is: each block encodes it itself, which saves memory.
    """
    if draws == 1:
        return condition
    return (blip3o.apply(model, params, "dit", "encode_condition", condition),) * draws


OBJECTIVE = Objective(Settings, make, fields=fields, flops_per_step=flops_per_step)
