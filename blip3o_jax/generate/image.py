"""Guided denoising of latents under the states of image tokens, and their decoding to pixels.

B pictures, M states of the image span, D decoder width, y x latent cells, C latent channels.

Source: BLIP3o-NEXT `generate_images` and `inference_editing.py` (their second halves).
Differs from the reference:
1. What depends on the condition alone is computed once: connector, caption projection, every block's keys and values.
2. The null condition is attended to as one vector per kind with its multiplicity, which is exactly equal.
3. Latents stay in float32; guidance 1 runs no unconditional half; a negative prompt may take the null's place.
4. Each picture has its own key, so it does not depend on the batch around it.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.diffusion import flow, guidance, samplers
from blip3o_jax.models import blip3o
from blip3o_jax.models.sana import ConditionKV
from blip3o_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Denoising:
    """How latents are denoised."""

    num_inference_steps: int = 30
    sampler: str = "euler"


@flax.struct.dataclass
class Canvas:
    """Pictures under way."""

    step: jax.Array  # i32[], steps taken
    sampler: samplers.SamplerState  # its `x` is f32[B y x C]
    conditions: tuple[ConditionKV, ...]  # (null, condition), or (condition,) without guidance
    guidance_scale: jax.Array  # f32[]
    ref_latent: jax.Array | None  # f32[B y x C]


def noise(config: Blip3oConfig, keys: jax.Array, height: int, width: int) -> jax.Array:
    """Initial latents f32[B y x C], standard normal, of keys [B] and the picture's size in pixels."""
    factor = config.autoencoder.spatial_factor
    shape = (height // factor, width // factor, config.autoencoder.latent_channels)
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def start(
    config: Blip3oConfig,
    params: Params,
    states: jax.Array,
    latents: jax.Array,
    ref_latent: jax.Array | None,
    has_ref: jax.Array | None,
    guidance_scale: jax.Array,
    negative_states: jax.Array | None,
    guided: bool,
) -> Canvas:
    """Sets up denoising.

    Args:
      states: [B M D] hidden states of the image span.
      latents: f32[B y x C], noise.
      ref_latent: f32[B y x C], scaled, of the reference; needed by the editing forms that take latents.
      has_ref: bool[B], rows that have a reference.
      guidance_scale: f32[], used where `guided`.
      negative_states: [B M D], states of a negative prompt in place of the null condition; None for the null.
      guided: whether an unconditional half is run at all.
    """
    if ref_latent is not None:
        ref_latent = jnp.where(has_ref[:, None, None, None], ref_latent, 0)
    condition = blip3o.make_condition(config, params, states, ref_latent, has_ref)
    conditions = [encode(config, params, condition)]
    if guided:
        conditions.insert(0, unconditional(config, params, condition.shape[1], negative_states))
    return Canvas(jnp.int32(0), samplers.initial_state(latents), tuple(conditions), guidance_scale, ref_latent)


def encode(config, params, condition, log_weight=None) -> ConditionKV:
    """Keys and values of a condition [B M E] for every block."""
    return blip3o.apply(config, params, "dit", "encode_condition", condition, log_weight)


def unconditional(
    config: Blip3oConfig, params: Params, length: int, negative_states: jax.Array | None = None
) -> ConditionKV:
    """Keys and values of the null condition that stands for a condition of `length` tokens; see `start`."""
    references = length - 1 - config.num_image_tokens
    vectors, counts = blip3o.null_condition(config, params, references)
    log_counts = jnp.log(counts.astype(jnp.float32))
    if negative_states is None:
        return encode(config, params, vectors[None], log_counts[None])
    own = blip3o.apply(config, params, "connector", "__call__", negative_states)
    rest = jnp.broadcast_to(vectors[1:], (own.shape[0], len(counts) - 1, own.shape[-1]))
    weights = jnp.concatenate([jnp.zeros(own.shape[1]), log_counts[1:]])
    weights = jnp.broadcast_to(weights, (own.shape[0], weights.shape[0]))
    return encode(config, params, jnp.concatenate([own, rest], axis=1), weights)


def advance(config: Blip3oConfig, params: Params, canvas: Canvas, settings: Denoising, stop: jax.Array) -> Canvas:
    """Denoises up to step `stop` (i32[], traced: one compiled program serves any stretch)."""
    sigmas = flow.inference_sigmas(config.schedule, settings.num_inference_steps)

    def grouped(x, sigma, conditions):
        return blip3o.velocity(config, params, x, sigma, conditions, canvas.ref_latent)

    *null, condition = canvas.conditions
    if null:
        denoise = guidance.guided(grouped, condition, null[0], canvas.guidance_scale)
    else:
        denoise = guidance.guided(grouped, condition, None, 1)
    state = samplers.advance(denoise, canvas.sampler, sigmas, settings.sampler, canvas.step, stop)
    return canvas.replace(step=stop, sampler=state)
