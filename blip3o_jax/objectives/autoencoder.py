"""Reconstruction objective of the autoencoder, optionally with an adversarial loss.

B rows, Y X pixels, y x latent cells, C latent channels.

Generator and discriminator are trained by one loss: the generator's term treats the discriminator's parameters as
constants, the discriminator's term treats the reconstructions as constants, so one backward pass gives both gradients
(XLA merges the two equal evaluations on reconstructions). Both share one optimizer: a row `("^discriminator", factor)`
of `optimizer.learning_rate_rules` sets the discriminator's learning rate, and `clip_norm` applies to both together.

Latents are deterministic, as in DC-AE. `latent_square` reports the mean square of the scaled latents, which should be 1
for diffusion: divide `autoencoder.scaling_factor` by its square root after training, or set `unit_weight`.

Source: DC-AE (arXiv 2410.10733); hinge losses of arXiv 1705.02894, patch discriminator of arXiv 1611.07004.
Differs from the reference: a Laplacian pyramid (`pixel_losses`) instead of LPIPS.
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
from blip3o_jax.errors import require
from blip3o_jax.models import blip3o
from blip3o_jax.models.discriminator import Discriminator, DiscriminatorConfig, smallest_side
from blip3o_jax.objectives.objective import Objective, images_only
from blip3o_jax.objectives.pixel_losses import DISTANCES, laplacian_distance, pixel_distance, psnr
from blip3o_jax.train.step import LossTerm, Scheduled
from blip3o_jax.types import Batch, Metrics, Params

Terms = dict[str, LossTerm]


@dataclasses.dataclass(frozen=True)
class Adversarial:
    """Settings of the adversarial loss."""

    weight: Positive = 0.1  # of the generator's term; that of the discriminator has weight 1
    start_step: Natural = 0  # first step with an adversarial loss
    discriminator: DiscriminatorConfig = DiscriminatorConfig()


@dataclasses.dataclass(frozen=True)
class Settings:
    """Terms of the reconstruction loss."""

    distance: Annotated[str, OneOf(*DISTANCES)] = "l1"  # of pixels
    laplacian_weight: Weight = 0.0  # of the distance of Laplacian pyramids
    unit_weight: Weight = 0.0  # of (mean square of an image's scaled latent - 1)^2
    latent_noise: Weight = 0.0  # standard deviation of noise added to scaled latents in training
    adversarial: Adversarial | None = None


def make(model: Blip3oConfig, settings: Settings) -> Scheduled:
    """Returns the loss function; parameters: `autoencoder`, and those of `extra_modules`.

    Raises:
      UserError: images are too small for the discriminator.
    """
    start = 0
    if settings.adversarial is not None:
        start, config = settings.adversarial.start_step, settings.adversarial.discriminator
        require(
            model.image_size >= smallest_side(config),
            "settings.adversarial.discriminator.depth",
            f"{config.depth} for images of {model.image_size} pixels",
            f"{smallest_side(config)} pixels or more",
            "lower it",
        )

    def at(step: jax.Array, key: jax.Array):
        del key
        return functools.partial(_loss, model, settings, step >= start)

    held_out = dataclasses.replace(settings, latent_noise=0.0)
    return Scheduled(at, functools.partial(_loss, model, held_out, True))


def extra_modules(model: Blip3oConfig, settings: Settings) -> dict[str, Callable[[jax.Array], Params]]:
    """Returns the initialiser of the discriminator, if there is one."""
    if settings.adversarial is None:
        return {}
    side = model.image_size
    pixels, module = jnp.zeros((1, side, side, model.autoencoder.in_channels)), _discriminator(model, settings)
    return {"discriminator": lambda key: module.init(key, pixels)["params"]}


def flops_per_step(model: Blip3oConfig, settings: Settings, layout: Any, rows: int, trainable: Params) -> float:
    """Counts one update over all rows, without the discriminator.

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
    """Computes the hinge losses of generator and discriminator.

    Args:
      real: f32[B Y X 3], images.
      made: f32[B Y X 3], reconstructions; the only argument that the generator's loss is differentiated in.

    Returns:
      Sums f32[] over the rows: generator's loss, discriminator's loss, scores of real images and of reconstructions.
    """

    def score(params, pixels):
        return module.apply({"params": params}, pixels)

    generated = score(jax.lax.stop_gradient(params), made)
    on_real, on_made = score(params, real), score(params, jax.lax.stop_gradient(made))
    hinge = 0.5 * (jax.nn.relu(1 - on_real) + jax.nn.relu(1 + on_made))
    return tuple(x.mean(axis=(1, 2)).sum() for x in (-generated, hinge, on_real, on_made))


def _loss(
    model: Blip3oConfig,
    settings: Settings,
    adversarial: jax.Array | bool,
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
        adversarial,
        lambda: adversarial_sums(module, params["discriminator"], pixels, made),
        lambda: (jnp.zeros(()),) * 4,
    )
    weight = jnp.where(adversarial, rows, 0.0)
    terms["generator"] = LossTerm(sums[0], weight, settings.adversarial.weight)
    terms["discriminator"] = LossTerm(sums[1], weight)
    return terms, metrics | {"score_real": (sums[2], weight), "score_made": (sums[3], weight)}


def _discriminator(model: Blip3oConfig, settings: Settings) -> Discriminator:
    numerics = model.autoencoder
    return Discriminator(settings.adversarial.discriminator, jnp.dtype(numerics.dtype), jnp.dtype(numerics.param_dtype))


OBJECTIVE = Objective(
    Settings,
    make,
    fields=images_only("target_pixels"),
    extra_modules=extra_modules,
    flops_per_step=flops_per_step,
)
