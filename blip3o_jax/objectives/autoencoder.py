"""The autoencoder's objective: images come back; a discriminator may ask for more than the mean of what is likely.

B rows, Y X pixels, y x latent cells, C latent channels.

The adversarial game is one loss: the generator's term sees the discriminator's parameters as constants, the
discriminator's term sees the made images as constants, so that one backward pass gives each side its own gradient
(the compiler merges the two equal evaluations on made images). Both sides share one optimizer: a rate of its own for
the discriminator is a row `("^discriminator", factor)` of `optimizer.learning_rate_rules`, and `clip_norm` bounds both
gradients together.

Latents are deterministic, as DC-AE has them; `latent_square` reports the mean square of the scaled latents. Diffusion
wants it to be 1: divide `autoencoder.scaling_factor` by its root afterwards, or let `unit_weight` hold it there.

Source: DC-AE (arXiv 2410.10733); hinge losses of Lim & Ye 2017 (arXiv 1705.02894), patches of arXiv 1611.07004.
Differs from the reference:
1. A Laplacian pyramid in place of LPIPS, which needs a network trained on photographs (`pixel_losses`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from blip3o_jax import flops, masked
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.schema import Natural, OneOf, Positive, Weight
from blip3o_jax.errors import UserError
from blip3o_jax.models import blip3o
from blip3o_jax.models.discriminator import Discriminator, DiscriminatorConfig, smallest_side
from blip3o_jax.objectives.pixel_losses import DISTANCES, laplacian_distance, pixel_distance, psnr
from blip3o_jax.train.step import LossTerm, Scheduled
from blip3o_jax.types import Batch, Metrics, Params

Terms = dict[str, LossTerm]


@dataclasses.dataclass(frozen=True)
class Adversarial:
    """The game against a discriminator."""

    weight: Positive = 0.1  # of the generator's term; the discriminator's has weight 1
    start_step: Natural = 0  # before it, neither side is computed
    discriminator: DiscriminatorConfig = DiscriminatorConfig()


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a reconstruction is measured by."""

    distance: Annotated[str, OneOf(*DISTANCES)] = "l1"  # of pixels
    laplacian_weight: Weight = 0.0  # of the Laplacian pyramid's term; 0: not computed
    unit_weight: Weight = 0.0  # of (mean square of an image's scaled latent - 1)^2
    latent_noise: Weight = 0.0  # deviation of what is added to scaled latents before decoding; held-out batches: none
    adversarial: Adversarial | None = None


def make(model: Blip3oConfig, settings: Settings) -> Scheduled:
    """The loss for `train.step`. Parameters: `autoencoder`, and those of `extra_modules`.

    Raises:
      UserError: images too small for the discriminator.
    """
    start = 0
    if settings.adversarial is not None:
        start = settings.adversarial.start_step
        check_depth(settings.adversarial.discriminator, model.image_size)

    def at(step: jax.Array, key: jax.Array):
        del key
        return functools.partial(_loss, model, settings, step >= start)

    held_out = dataclasses.replace(settings, latent_noise=0.0)
    return Scheduled(at, functools.partial(_loss, model, held_out, True))


def extra_modules(model: Blip3oConfig, settings: Settings) -> dict[str, Callable[[jax.Array], Params]]:
    """Subtrees of this stage alone: name -> function of a key that makes its annotated parameters."""
    if settings.adversarial is None:
        return {}
    side = model.image_size
    pixels, module = jnp.zeros((1, side, side, model.autoencoder.in_channels)), _discriminator(model, settings)
    return {"discriminator": lambda key: module.init(key, pixels)["params"]}


def fields(model: Blip3oConfig, max_references: int, precomputed: bool) -> tuple[str, ...]:
    """Optional fields of `types.Batch` that the objective reads; see `joint.fields`.

    Raises:
      UserError: latents instead of images.
    """
    del model, max_references
    if precomputed:
        raise UserError("row.precomputed", got="True", expected="images for the autoencoder", do="use the data itself")
    return ("target_pixels",)


def flops_per_step(model: Blip3oConfig, settings: Settings, layout: Any, rows: int, trainable: Params) -> float:
    """Floating-point operations of one update over all rows, without the discriminator's.

    A half costs its forward pass, as much again for the gradients of its activations, if it or the half before it
    trains, and as much again for those of its weights, if it trains.
    """
    del settings
    trains = trainable.get("autoencoder", {})
    encode, decode = (flops.autoencoder(model, name, layout.height, layout.width) for name in ("encode", "decode"))
    encoder, decoder = ("encoder" in trains), ("decoder" in trains)
    return rows * (encode * (1 + 2 * encoder) + decode * (1 + (encoder or decoder) + decoder))


def adversarial_sums(
    module: Discriminator, params: Params, real: jax.Array, made: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Both sides of the game, summed over the rows: generator's loss, discriminator's loss, scores of real and made.

    Args:
      params: of the discriminator.
      real: f32[B Y X 3].
      made: f32[B Y X 3]; the generator's loss is differentiable in it, and in nothing else.
    """
    judge = jax.lax.stop_gradient(params)
    fooled = _scores(module, judge, made)
    on_real, on_made = _scores(module, params, real), _scores(module, params, jax.lax.stop_gradient(made))
    told = 0.5 * (jax.nn.relu(1 - on_real) + jax.nn.relu(1 + on_made))
    return tuple(x.mean(axis=(1, 2)).sum() for x in (-fooled, told, on_real, on_made))


def check_depth(config: DiscriminatorConfig, side: int) -> None:
    """Raises UserError where images of this side leave no patch to score."""
    if side < smallest_side(config):
        raise UserError(
            "adversarial.discriminator.depth",
            got=f"{config.depth} for images of {side} pixels",
            expected=f"{smallest_side(config)} pixels or more",
            do="lower it",
        )


def _loss(
    model: Blip3oConfig,
    settings: Settings,
    playing: jax.Array | bool,
    params: Params,
    batch: Batch,
    keys: jax.Array,
) -> tuple[Terms, Metrics]:
    pixels = batch.target_pixels
    latent = blip3o.encode_latent(model, params, pixels)
    decoded = latent
    if settings.latent_noise:
        noise = jax.vmap(lambda key: jax.random.normal(key, latent.shape[1:]))(keys)
        decoded = latent + settings.latent_noise * noise
    made = blip3o.decode_latent(model, params, decoded)
    square = jnp.square(latent).mean(axis=(1, 2, 3))
    rows = jnp.float32(pixels.shape[0])
    terms = {"pixel": LossTerm(pixel_distance(settings.distance, made, pixels).sum(), rows)}
    if settings.laplacian_weight:
        terms["laplacian"] = LossTerm(laplacian_distance(made, pixels).sum(), rows, settings.laplacian_weight)
    if settings.unit_weight:
        terms["unit"] = LossTerm(jnp.square(square - 1).sum(), rows, settings.unit_weight)
    metrics = {
        "psnr": masked.metric(psnr(made, pixels)),
        "images": (rows, jnp.float32(1)),
        "latent_square": masked.metric(square),
    }
    if settings.adversarial is None:
        return terms, metrics
    module = _discriminator(model, settings)
    sums = jax.lax.cond(
        playing,
        lambda: adversarial_sums(module, params["discriminator"], pixels, made),
        lambda: (jnp.zeros(()),) * 4,
    )
    played = jnp.where(playing, rows, 0.0)
    terms["generator"] = LossTerm(sums[0], played, settings.adversarial.weight)
    terms["discriminator"] = LossTerm(sums[1], played)
    return terms, metrics | {"score_real": (sums[2], played), "score_made": (sums[3], played)}


def _discriminator(model: Blip3oConfig, settings: Settings) -> Discriminator:
    numerics = model.autoencoder
    return Discriminator(settings.adversarial.discriminator, jnp.dtype(numerics.dtype), jnp.dtype(numerics.param_dtype))


def _scores(module: Discriminator, params: Params, pixels: jax.Array) -> jax.Array:
    return module.apply({"params": params}, pixels)
