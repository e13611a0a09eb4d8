"""Guided denoising of latents under the hidden states of image tokens.

P prompts, B = P * samples images, M hidden states of the image span, D decoder width, y x latent cells, C latent
channels.

Source: BLIP3o-NEXT `generate_images` and `inference_editing.py` (their second halves).
Differs from the reference:
1. What depends on the condition alone is computed once: connector, caption projection, every block's keys and values.
2. The null condition is attended to as one vector per kind with its multiplicity, which is exactly equal.
3. Latents stay in float32; guidance 1 runs no unconditional half; a negative prompt may take the null's place.
4. Each image has its own key, so it does not depend on the batch around it.
"""

import dataclasses
from typing import Annotated, Any

import flax.struct
import jax
import jax.numpy as jnp

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.schema import Named, Range
from blip3o_jax.diffusion import flow, guidance, samplers
from blip3o_jax.generate.prompts import Reference
from blip3o_jax.models import blip3o
from blip3o_jax.models.protocols import EncodedCondition
from blip3o_jax.types import Params

Steps = Annotated[int, Range(1, 10_000)]
SamplerName = Annotated[str, Named(samplers.SAMPLERS)]


@dataclasses.dataclass(frozen=True)
class Denoising:
    """How latents are denoised."""

    num_inference_steps: Steps = 30
    sampler: SamplerName = "euler"


@flax.struct.dataclass
class Canvas:
    """Images under way."""

    step: jax.Array  # i32[], steps taken
    x: jax.Array  # f32[B y x C]
    state: Any  # of the sampler
    conditions: tuple[EncodedCondition, ...]  # (null, condition), or (condition,) without guidance
    guidance_scale: jax.Array  # f32[]
    ref_latent: jax.Array | None  # f32[B y x C]


def noise(config: Blip3oConfig, keys: jax.Array, height: int, width: int) -> jax.Array:
    """Initial latents f32[B y x C], standard normal, of keys [B] and the image's size in pixels."""
    factor = config.autoencoder.spatial_factor
    shape = (height // factor, width // factor, config.autoencoder.latent_channels)
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def start(
    config: Blip3oConfig,
    params: Params,
    hidden: jax.Array,
    latents: jax.Array,
    keys: jax.Array,
    settings: Denoising,
    reference: Reference | None,
    guidance_scale: jax.Array | None,
    negative: jax.Array | None = None,
) -> Canvas:
    """Sets up denoising.

    Args:
      hidden: [B M D], of the image span.
      latents: f32[B y x C], noise.
      keys: key[B], of what the sampler draws.
      reference: of P prompts; needed by the editing forms that take latents.
      guidance_scale: f32[]; None: no unconditional half is run.
      negative: [B M D], of a negative prompt in place of the null condition; None for the null.
    """
    ref_latent, has_ref = masked_reference(reference, len(hidden))
    condition = blip3o.make_condition(config, params, hidden, ref_latent, has_ref)
    conditions = [encode(config, params, condition)]
    if guidance_scale is not None:
        conditions.insert(0, unconditional(config, params, condition.shape[1], negative))
    state = samplers.find(settings.sampler).init(latents, keys)
    scale = jnp.float32(1) if guidance_scale is None else guidance_scale
    return Canvas(jnp.int32(0), latents, state, tuple(conditions), scale, ref_latent)


def masked_reference(reference: Reference | None, rows: int) -> tuple[jax.Array | None, jax.Array | None]:
    """Latent f32[B y x C], zeros where there is none, and presence bool[B] of every image of the prompts."""
    if reference is None:
        return None, None
    latent, present = (jnp.repeat(x, rows // len(x), axis=0) for x in reference)
    return jnp.where(present[:, None, None, None], latent, 0), present


def encode(config, params, condition, log_weight=None) -> EncodedCondition:
    """Keys and values of a condition [B M E] for every block."""
    return blip3o.apply(config, params, "dit", "encode_condition", condition, log_weight)


def unconditional(
    config: Blip3oConfig, params: Params, length: int, negative: jax.Array | None = None
) -> EncodedCondition:
    """Keys and values of the null condition that stands for a condition of `length` tokens; see `start`."""
    references = length - 1 - config.num_image_tokens
    vectors, counts = blip3o.null_condition(config, params, references)
    log_counts = jnp.log(counts.astype(jnp.float32))
    if negative is None:
        return encode(config, params, vectors[None], log_counts[None])
    own = blip3o.apply(config, params, "connector", "__call__", negative)
    rest = jnp.broadcast_to(vectors[1:], (own.shape[0], len(counts) - 1, own.shape[-1]))
    weights = jnp.concatenate([jnp.zeros(own.shape[1]), log_counts[1:]])
    weights = jnp.broadcast_to(weights, (own.shape[0], weights.shape[0]))
    return encode(config, params, jnp.concatenate([own, rest], axis=1), weights)


def advance(config: Blip3oConfig, params: Params, canvas: Canvas, settings: Denoising, stop: jax.Array) -> Canvas:
    """Denoises up to step `stop` (i32[], traced: one compiled program serves any stretch)."""
    sigmas = flow.inference_sigmas(config.schedule, settings.num_inference_steps)

    def grouped(x, sigma, conditions, until):
        return blip3o.velocity(config, params, x, sigma, conditions, canvas.ref_latent, until)

    denoise = guidance.guided(grouped, canvas.conditions, canvas.guidance_scale)
    sampler = samplers.find(settings.sampler)
    x, state = samplers.advance(sampler, denoise, canvas.x, canvas.state, sigmas, canvas.step, stop)
    return canvas.replace(step=stop, x=x, state=state)
