"""Objective of the image tokenizer: codes that allow reconstructing a teacher's features or the pixels.

B rows, P side of the tokenizer's input, N codes of an image, T patches, D width of the vision tower, Q codebook size,
E code dimension, p patch size.

Each step draws one of the pool scales, so that one codebook serves all resolutions; features and pixels are regressed
at the resolution of the codes. A fraction of the rows skips quantisation, which gives the encoder an unobstructed
gradient and the decoder a stable input. This prevents early codebook collapse, as does initialising the codebook with
outputs of the encoder (`initialise_codebook`). Evaluation uses the model's own pool scale and the nearest codes.

Source: TA-Tok of Tar (arXiv 2506.18898), SimVQ (arXiv 2411.02038).
Differs from the reference:
1. The teacher's features are pooled to the grid of the codes; the reference's comparison at coarser scales, and its
   distance, are not published.
2. Pixels can be regressed in addition to features, or instead if there is no pretrained teacher.
3. Unquantised rows, and initialisation of the codebook from data.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from einops import reduce

from blip3o_jax import flops, masked, treepath
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.schema import Count, OneOf, Share, Weight, Width
from blip3o_jax.errors import UserError, require
from blip3o_jax.models.pixel_head import PixelHead
from blip3o_jax.models.siglip import SiglipVision
from blip3o_jax.models.ta_tok import TATok, TATokOutput, average_pool
from blip3o_jax.models.vq import normalize
from blip3o_jax.objectives.objective import Objective, images_only
from blip3o_jax.objectives.pixel_losses import DISTANCES, pixel_distance, psnr
from blip3o_jax.train.step import LossTerm, Scheduled
from blip3o_jax.types import Batch, Metrics, Params

CODEBOOK = "image_tokenizer/quantizer/embedding/table"  # path of its parameters
SMALLEST_DISTANCE = 1e-6  # squared; lets `spread_choice` repeat rows when no distant ones are left
SEPARATION = 0.2  # distance of unit vectors below which `spread_choice` treats them as equal
START_NOISE = 0.1  # norm of the noise that distinguishes equal initial codes


@dataclasses.dataclass(frozen=True)
class FeatureTarget:
    """Regression of the features of a frozen vision tower, the extra module `teacher`."""

    distance: Annotated[str, OneOf("cosine", "l2")] = "cosine"
    weight: Weight = 1.0


@dataclasses.dataclass(frozen=True)
class PixelTarget:
    """Regression of pixels by a small head, the extra module `pixel_head`."""

    distance: Annotated[str, OneOf(*DISTANCES)] = "l2"
    weight: Weight = 1.0
    hidden: Width = 512  # width of the head


@dataclasses.dataclass(frozen=True)
class Settings:
    """Terms of the loss, and how codes are formed in training."""

    features: FeatureTarget | None = None
    pixels: PixelTarget | None = None
    codebook_weight: Weight = 1.0  # pulls codes towards the encoder's outputs
    commitment_weight: Weight = 0.25  # pulls the encoder's outputs towards their codes
    pool_scales: tuple[Count, ...] = (1, 2, 3)  # drawn uniformly, one per step; may be repeated
    unquantized_share: Share = 0.12  # fraction of rows that skip quantisation
    stochastic_codes: bool = False  # sample codes at the tokenizer's temperature, as the reference does
    codebook_from_data: bool = False  # initialise the codebook with outputs of the encoder in new runs

    def __post_init__(self):
        targets = self.features or self.pixels
        require(targets, "settings", "neither features nor pixels", "a target to regress", "give one")
        require(self.pool_scales, "settings.pool_scales", "none", "at least one", "give (1,)")


def make(model: Blip3oConfig, settings: Settings) -> Scheduled:
    """Returns the loss function; parameters: `image_tokenizer`, and those of `extra_modules`.

    Raises:
      UserError: a pool scale without a token in the model's vocabulary.
    """
    for scale in settings.pool_scales:
        known = scale <= model.tokens.num_scales
        require(known, "settings.pool_scales", scale, f"1 to {model.tokens.num_scales}", "choose among them")

    def at(step: jax.Array, key: jax.Array):
        del step
        drawn = jax.random.randint(key, (), 0, len(settings.pool_scales))
        return functools.partial(_loss, model, settings, drawn)

    held_out = dataclasses.replace(
        settings, pool_scales=(model.pool_scale,), unquantized_share=0.0, stochastic_codes=False
    )
    return Scheduled(at, functools.partial(_loss, model, held_out, 0))


def extra_modules(model: Blip3oConfig, settings: Settings) -> dict[str, Callable[[jax.Array], Params]]:
    """Returns the initialisers of `teacher` and `pixel_head`, as far as the settings use them."""
    config, modules = model.image_tokenizer, {}
    if settings.features is not None:
        image = jnp.zeros((1, config.image_size, config.image_size, config.encoder.in_channels))
        modules["teacher"] = lambda key: SiglipVision(config.encoder).init(key, image)["params"]
    if settings.pixels is not None:
        features = jnp.zeros((1, 1, config.encoder.width))
        modules["pixel_head"] = lambda key: _pixel_head(model, settings).init(key, features)["params"]
    return modules


def flops_per_step(model: Blip3oConfig, settings: Settings, layout: Any, rows: int, trainable: Params) -> float:
    """Counts one update over all rows at pool scale 1, without the teacher."""
    del settings, layout
    config, trains = model.image_tokenizer, trainable.get("image_tokenizer", {})
    tower, encode = flops.vit(config.encoder, config.grid_size**2), flops.image_tokenizer(model)
    decode = flops.vit(config.decoder, config.num_tokens())
    return rows * (encode + 2 * tower * ("encoder" in trains) + decode * (2 + ("decoder" in trains)))


def first_parameters(
    model: Blip3oConfig,
    settings: Settings,
    params: Params,
    frozen: Params,
    draw_batch: Callable[[], Batch],
    key: jax.Array,
) -> Params:
    """Returns the initial trainable parameters: with `codebook_from_data`, with a codebook from the first batch.

    Raises:
      UserError: `codebook_from_data` is set, but the codebook is frozen.
    """
    if not settings.codebook_from_data:
        return params
    if CODEBOOK not in treepath.flatten(params):
        raise UserError(
            "settings.codebook_from_data",
            got=f"True, and {CODEBOOK} does not train",
            expected="a trainable codebook",
            do="change `trainable`, or leave the option out",
        )
    run = jax.jit(initialise_codebook, static_argnums=(0, 1))
    whole = treepath.flatten(run(model, settings, treepath.merge(params, frozen), draw_batch(), key))
    return treepath.unflatten({path: whole[path] for path in treepath.flatten(params)})


def initialise_codebook(
    model: Blip3oConfig, settings: Settings, params: Params, batch: Batch, key: jax.Array
) -> Params:
    """Replaces all codes by outputs of the encoder for a batch; the projection of the codebook stays.

    Args:
      settings: the pool scales of the outputs.
      batch: images; if their tokens are fewer than Q, some codes differ by noise only.
      key: selects outputs and draws the noise.
    """
    quantizer = params["image_tokenizer"]["quantizer"]
    table, projection = quantizer["embedding"]["table"], quantizer["projection"]
    patches = _apply(model, params, "tower", batch.target_tokenizer_pixels)
    codebook = _apply(model, params, "codebook")
    found = [_apply(model, params, "encode_tower", patches, scale, codebook).z for scale in set(settings.pool_scales)]
    z = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in found])
    size, width = table.shape
    picked_key, noise_key = jax.random.split(key)
    picked = spread_choice(picked_key, z, size)
    noise = START_NOISE * width**-0.5 * jax.random.normal(noise_key, (size, width))
    kernel, bias = projection["kernel"].astype(jnp.float32), projection["bias"].astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        length = jnp.linalg.norm(table.astype(jnp.float32) @ kernel + bias, axis=-1).mean()
        rows = jnp.linalg.solve(kernel.T, (length * normalize(picked + noise) - bias).T).T
    return treepath.unflatten(treepath.flatten(params) | {CODEBOOK: rows.astype(table.dtype)})


def spread_choice(key: jax.Array, z: jax.Array, size: int) -> jax.Array:
    """Chooses rows as k-means++ does: with a probability proportional to the squared distance from those chosen before.

    Rows nearer than SEPARATION to a chosen one are taken only if no others are left, so that the slightly varying
    background of most images takes a single code.

    Source: Arthur & Vassilvitskii (2007).

    Args:
      z: f32[M E], unit vectors.
      size: number of rows to choose.

    Returns:
      f32[size E].
    """

    def draw(distance, key):
        row = z[jax.random.categorical(key, jnp.log(distance))]
        with jax.default_matmul_precision("highest"):
            near = 2 - 2 * (z @ row)
            near = jnp.where(near > SEPARATION**2, near, SMALLEST_DISTANCE)
        return jnp.minimum(distance, near), row

    _, rows = jax.lax.scan(draw, jnp.full(z.shape[0], 4.0), jax.random.split(key, size))
    return rows


def _loss(
    model: Blip3oConfig,
    settings: Settings,
    drawn: jax.Array | int,
    params: Params,
    batch: Batch,
    keys: jax.Array,
) -> tuple[dict[str, LossTerm], Metrics]:
    pixels = batch.target_tokenizer_pixels
    patches = _apply(model, params, "tower", pixels)
    codebook = _apply(model, params, "codebook")
    taught = None
    if settings.features is not None:
        tower = SiglipVision(model.image_tokenizer.encoder)
        taught = jax.lax.stop_gradient(tower.apply({"params": params["teacher"]}, pixels))
    bare = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, 0), settings.unquantized_share))(keys)
    code_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys) if settings.stochastic_codes else None

    def at_scale(scale: int) -> dict[str, jax.Array]:
        output = _apply(model, params, "encode_tower", patches, scale, codebook, code_keys)
        decoded = _apply(model, params, "decode", jnp.where(bare[:, None, None], output.z, output.quantized))
        values = _code_values(model, output)
        if taught is not None:
            target = average_pool(taught, model.image_tokenizer.grid_size, scale).astype(jnp.float32)
            values["feature"] = _feature_distance(settings.features.distance, decoded, target)
        if settings.pixels is not None:
            seen = _pixel_head(model, settings).apply({"params": params["pixel_head"]}, decoded)
            target = pooled_pixels(model, pixels, scale)
            values["pixel"] = pixel_distance(settings.pixels.distance, seen, target)
            values["psnr"] = psnr(seen, target)
        return values

    values = jax.lax.switch(drawn, [functools.partial(at_scale, scale) for scale in settings.pool_scales])
    return _terms_and_metrics(settings, values, bare)


def _terms_and_metrics(
    settings: Settings, values: dict[str, jax.Array], bare: jax.Array
) -> tuple[dict[str, LossTerm], Metrics]:
    rows = jnp.float32(bare.shape[0])
    weights = {"codebook": settings.codebook_weight, "commitment": settings.commitment_weight}
    if settings.features is not None:
        weights["feature"] = settings.features.weight
    if settings.pixels is not None:
        weights["pixel"] = settings.pixels.weight
    terms = {name: LossTerm(values[name].sum(), rows, weight) for name, weight in weights.items()}
    # statistics of a micro-batch as a whole, averaged over micro-batches
    metrics = {name: (rows * values[name], rows) for name in ("perplexity", "codes_used")}
    metrics["images"] = (rows, jnp.float32(1))
    metrics["code_cosine"] = masked.metric(values["code_cosine"])
    if settings.pixels is not None:
        metrics["psnr"] = masked.metric(values["psnr"], ~bare)
    return terms, metrics


def _code_values(model: Blip3oConfig, output: TATokOutput) -> dict[str, jax.Array]:
    """Returns SimVQ's loss terms f32[B], the mean cosine f32[B], and statistics f32[] of the codes in use."""
    z, codes = output.z, output.codes
    count = jnp.bincount(output.indices.reshape(-1), length=model.image_tokenizer.codebook_size)
    share = count / output.indices.size
    entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-20)))
    return {
        "codebook": jnp.square(codes - jax.lax.stop_gradient(z)).mean(axis=(1, 2)),
        "commitment": jnp.square(z - jax.lax.stop_gradient(codes)).mean(axis=(1, 2)),
        "code_cosine": jnp.sum(z * codes, axis=-1).mean(axis=1),
        "perplexity": jnp.exp(entropy),  # 1: a single code; Q: uniform use
        "codes_used": jnp.mean(count > 0),  # fraction of the codebook
    }


def _feature_distance(kind: str, features: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the distance f32[B] of f32[B N D]: 1 - cosine similarity, or the mean squared difference."""
    if kind == "cosine":
        return 1 - jnp.sum(normalize(features) * normalize(target), axis=-1).mean(axis=1)
    return jnp.square(features - target).mean(axis=(1, 2))


def pooled_pixels(model: Blip3oConfig, pixels: jax.Array, scale: int) -> jax.Array:
    """Averages f32[B P P C] over scale x scale pixels, cropped to the area of the codes: p pixels per code and side."""
    config = model.image_tokenizer
    side = config.grid_size // scale * scale * config.encoder.patch_size
    return reduce(pixels[:, :side, :side], "B (y p) (x q) C -> B y x C", "mean", p=scale, q=scale)


def _pixel_head(model: Blip3oConfig, settings: Settings) -> PixelHead:
    c = model.image_tokenizer
    numerics = {"dtype": jnp.dtype(c.dtype), "param_dtype": jnp.dtype(c.param_dtype)}
    return PixelHead(c.encoder.patch_size, settings.pixels.hidden, c.encoder.in_channels, **numerics)


def _apply(model: Blip3oConfig, params: Params, method: str, *inputs):
    return TATok(model.image_tokenizer).apply({"params": params["image_tokenizer"]}, *inputs, method=method)


OBJECTIVE = Objective(
    Settings,
    make,
    fields=images_only("target_tokenizer_pixels"),
    extra_modules=extra_modules,
    copied={"teacher": "image_tokenizer/encoder"},
    first_parameters=first_parameters,
    flops_per_step=flops_per_step,
)
