"""Guided denoising of latents, conditioned on the hidden states of image tokens.

P prompts, B = P * samples images, M hidden states of the image span, D decoder width, y x latent cells, C latent
channels.

Source: BLIP3o-NEXT `generate_images` and `inference_editing.py` (their second halves).
Differs from the reference:
1. Computation that depends on the condition only runs once: connector, caption projection, keys and values of every
   block.
2. The null condition is attended to as one vector of each kind, weighted by its multiplicity: the same result exactly.
3. Latents stay in float32, guidance 1 skips the unconditional half, a negative prompt can replace the null condition.
4. Every image has its own key, so it does not depend on the rest of the batch.
"""

import dataclasses
from typing import Annotated, Any

import flax.struct
import jax
import jax.numpy as jnp

from blip3o_jax.config import Blip3oConfig, SanaConfig
from blip3o_jax.config.model import Steps
from blip3o_jax.config.schema import Named
from blip3o_jax.diffusion import flow, guidance, samplers
from blip3o_jax.generate.prompts import Reference
from blip3o_jax.models import blip3o
from blip3o_jax.models.protocols import EncodedCondition
from blip3o_jax.nn.scan import split
from blip3o_jax.types import Params

SamplerName = Annotated[str, Named(samplers.SAMPLERS)]


@dataclasses.dataclass(frozen=True)
class Denoising:
    """Denoising settings."""

    num_inference_steps: Steps = 30
    sampler: SamplerName = "euler"


@flax.struct.dataclass
class Canvas:
    """The state of the denoising loop."""

    step: jax.Array  # i32[], steps taken
    x: jax.Array  # f32[B y x C]
    state: Any  # state of the sampler
    conditions: tuple[EncodedCondition, ...]  # (null, condition), or (condition,) without guidance
    guidance_scale: jax.Array  # f32[]
    ref_latent: jax.Array | None  # f32[B y x C]


def laid_out(config: Blip3oConfig, params: Params, device: jax.Device) -> Params:
    """Returns the parameters in the layout for programs of one device.

    For a GPU the stacked parameters of SANA's blocks are split: a loop over stacks copies the weights of every block
    before it uses them. Other parameters, and those for other devices, are returned as they are.
    """
    stacked = isinstance(config.dit, SanaConfig) and "blocks" in params["dit"]  # another backbone may use its config
    if device.platform in ("cpu", "tpu") or not stacked:
        return params
    return {**params, "dit": {**params["dit"], "blocks": split(params["dit"]["blocks"])}}


def noise(config: Blip3oConfig, keys: jax.Array, height: int, width: int) -> jax.Array:
    """Draws initial latents f32[B y x C] from a standard normal, for keys [B] and the image size in pixels."""
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
    """Encodes the conditions and initialises the sampler.

    Args:
      config, params: the model.
      hidden: [B M D], hidden states of the image span.
      latents: f32[B y x C], noise.
      keys: key[B], for samplers that add noise.
      settings: sampler and number of steps.
      reference: of P prompts; required if `config.edit` uses reference latents.
      guidance_scale: f32[]; None skips the unconditional half.
      negative: [B M D], hidden states of a negative prompt; None uses the null condition.
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
    """Repeats references for B = `rows` images: latents f32[B y x C], zeros if absent, and presence bool[B]."""
    if reference is None:
        return None, None
    latent, present = (jnp.repeat(x, rows // len(x), axis=0) for x in reference)
    return masked(latent, present), present


def masked(ref_latent: jax.Array | None, has_ref: jax.Array | None) -> jax.Array | None:
    """Sets reference latents f32[B y x C] to zero where `has_ref` (bool[B]) is False; None stays None."""
    return None if ref_latent is None else jnp.where(has_ref[:, None, None, None], ref_latent, 0)


def encode(config, params, condition, log_weight=None) -> EncodedCondition:
    """Encodes a condition [B M E] for the diffusion backbone."""
    return blip3o.apply(config, params, "dit", "encode_condition", condition, log_weight)


def unconditional(
    config: Blip3oConfig, params: Params, length: int, negative: jax.Array | None = None
) -> EncodedCondition:
    """Encodes the null condition equivalent to `length` tokens, or a negative prompt; see `start`."""
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
    """Denoises up to step `stop` (i32[], traced)."""
    params = blip3o.with_whole(config, params, "dit")
    sigmas = flow.inference_sigmas(config.schedule, settings.num_inference_steps)

    def grouped(x, sigma, conditions, until):
        return blip3o.velocity(config, params, x, sigma, conditions, canvas.ref_latent, until)

    denoise = guidance.guided(grouped, canvas.conditions, canvas.guidance_scale)
    sampler = samplers.find(settings.sampler)
    x, state = samplers.advance(sampler, denoise, canvas.x, canvas.state, sigmas, canvas.step, stop)
    return canvas.replace(step=stop, x=x, state=state)
