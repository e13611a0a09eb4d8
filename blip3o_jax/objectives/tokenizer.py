"""The image tokenizer's objective: codes from which a teacher's features, or the pixels, can be reconstructed.

B rows, P side of the tokenizer's input, N codes of an image, T patches, D width of the tower, Q codebook size, E code
dimension, p patch size.

At every step one of the pool scales is drawn, so that one codebook serves coarse and fine images; features and
pixels are regressed at the resolution of the codes. A share of the rows is decoded from what was to be quantised
instead: the decoder then always has something to learn from, and the encoder a gradient that no code stands in the way
of. It keeps a codebook from collapsing early; so does starting it from the encoder's own outputs
(`initialise_codebook`). Held-out batches use the model's own pool scale and nothing but the nearest codes.

Source: TA-Tok of Tar (arXiv 2506.18898), SimVQ (arXiv 2411.02038).
Differs from the reference:
1. The teacher's features are pooled to the grid of the codes; how the reference compares at coarser scales, and whether
   by cosine or squared error, is not published.
2. Pixels may be regressed beside or in place of features, where there is no pretrained teacher.
3. Unquantised rows, and a codebook that starts from data.
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
from blip3o_jax.errors import UserError
from blip3o_jax.models.pixel_head import PixelHead
from blip3o_jax.models.siglip import SiglipVision
from blip3o_jax.models.ta_tok import TATok, TATokOutput, average_pool
from blip3o_jax.models.vq import normalize
from blip3o_jax.objectives.pixel_losses import DISTANCES, pixel_distance, psnr
from blip3o_jax.train.step import LossTerm, Scheduled
from blip3o_jax.types import Batch, Metrics, Params

CODEBOOK = "image_tokenizer/quantizer/embedding/table"  # path of its parameters
SMALLEST_DISTANCE = 1e-6  # squared, between unit vectors: rows that were drawn already stay possible
SEPARATION = 0.2  # distance below which unit vectors are told by one code to begin with
START_NOISE = 0.1  # length of what is added to the unit vectors a codebook starts from: it tells equal ones apart


@dataclasses.dataclass(frozen=True)
class FeatureTarget:
    """Regression onto the features of a frozen vision tower, the subtree `teacher`."""

    distance: Annotated[str, OneOf("cosine", "l2")] = "cosine"
    weight: Weight = 1.0


@dataclasses.dataclass(frozen=True)
class PixelTarget:
    """Regression onto pixels by a small head, the subtree `pixel_head`."""

    distance: Annotated[str, OneOf(*DISTANCES)] = "l2"
    weight: Weight = 1.0
    hidden: Width = 512  # width of the head


@dataclasses.dataclass(frozen=True)
class Settings:
    """What codes are measured by."""

    features: FeatureTarget | None = None
    pixels: PixelTarget | None = None
    codebook_weight: Weight = 1.0  # of moving codes towards the encoder's outputs
    commitment_weight: Weight = 0.25  # of moving the encoder's outputs towards their codes
    pool_scales: tuple[Count, ...] = (1, 2, 3)  # one is drawn at every step; repeat one to draw it more often
    unquantized_share: Share = 0.12  # of the rows
    stochastic_codes: bool = False  # draw codes at the tokenizer's temperature, as the reference trains
    codebook_from_data: bool = False  # a run from scratch starts with outputs of the encoder as codes

    def __post_init__(self):
        if self.features is None and self.pixels is None:
            raise UserError(
                "settings", got="neither features nor pixels", expected="a target to regress", do="give one"
            )
        if not self.pool_scales:
            raise UserError("settings.pool_scales", got="none", expected="at least one", do="give (1,)")


COPIED_MODULES = {"teacher": "image_tokenizer/encoder"}
"""Subtrees of `extra_modules` that start as copies of the pretrained parameters at this path."""


def make(model: Blip3oConfig, settings: Settings) -> Scheduled:
    """The loss for `train.step`. Parameters: `image_tokenizer`, and those of `extra_modules`.

    Raises:
      UserError: pool scales that the model has no token for.
    """
    for scale in settings.pool_scales:
        if not 1 <= scale <= model.tokens.num_scales:
            expected = f"1 to {model.tokens.num_scales}"
            raise UserError("settings.pool_scales", got=scale, expected=expected, do="choose among them")

    def at(step: jax.Array, key: jax.Array):
        del step
        drawn = jax.random.randint(key, (), 0, len(settings.pool_scales))
        return functools.partial(_loss, model, settings, drawn)

    held_out = dataclasses.replace(
        settings, pool_scales=(model.pool_scale,), unquantized_share=0.0, stochastic_codes=False
    )
    return Scheduled(at, functools.partial(_loss, model, held_out, 0))


def extra_modules(model: Blip3oConfig, settings: Settings) -> dict[str, Callable[[jax.Array], Params]]:
    """Subtrees of this stage alone: name -> function of a key that makes its annotated parameters."""
    config, modules = model.image_tokenizer, {}
    if settings.features is not None:
        image = jnp.zeros((1, config.image_size, config.image_size, config.encoder.in_channels))
        modules["teacher"] = lambda key: SiglipVision(config.encoder).init(key, image)["params"]
    if settings.pixels is not None:
        features = jnp.zeros((1, 1, config.encoder.width))
        modules["pixel_head"] = lambda key: _pixel_head(model, settings).init(key, features)["params"]
    return modules


def fields(model: Blip3oConfig, max_references: int, precomputed: bool) -> tuple[str, ...]:
    """Optional fields of `types.Batch` that the objective reads; see `joint.fields`.

    Raises:
      UserError: codes instead of images.
    """
    del model, max_references
    if precomputed:
        raise UserError("row.precomputed", got="True", expected="images for the tokenizer", do="use the data itself")
    return ("target_tokenizer_pixels",)


def flops_per_step(model: Blip3oConfig, settings: Settings, layout: Any, rows: int, trainable: Params) -> float:
    """Floating-point operations of one update over all rows at pool scale 1, without a teacher's."""
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
    """Trainable parameters before the first step: with a codebook of the first batch, where the settings ask for it.

    Raises:
      UserError: the settings ask for it, and the codebook does not train.
    """
    if not settings.codebook_from_data:
        return params
    if CODEBOOK not in treepath.flatten(params):
        raise UserError(
            "settings.codebook_from_data",
            got=f"True, and {CODEBOOK} does not train",
            expected="a trainable one",
            do="change `trainable`, or leave the option out",
        )
    run = jax.jit(initialise_codebook, static_argnums=(0, 1))
    whole = treepath.flatten(run(model, settings, treepath.merge(params, frozen), draw_batch(), key))
    return treepath.unflatten({path: whole[path] for path in treepath.flatten(params)})


def initialise_codebook(
    model: Blip3oConfig, settings: Settings, params: Params, batch: Batch, key: jax.Array, dead: jax.Array | None = None
) -> Params:
    """Parameters whose codes are outputs of the encoder, drawn from a batch; the codebook's projection stays.

    Args:
      params: whole, with `image_tokenizer`.
      batch: the more images the better: codes in excess of their tokens differ by a little noise only.
      dead: bool[Q], codes to replace, such as those that no image of a large sample uses; None: all.
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
    if dead is not None:
        rows = jnp.where(dead[:, None], rows, table.astype(jnp.float32))
    return treepath.unflatten(treepath.flatten(params) | {CODEBOOK: rows.astype(table.dtype)})


def spread_choice(key: jax.Array, z: jax.Array, size: int) -> jax.Array:
    """`size` rows of unit vectors z[M E], each drawn in proportion to its squared distance from those before it.

    Rows nearer than SEPARATION to one of those before wait until no other is left: the background of most images,
    with its faint shades, then takes a single code. Source: k-means++ (Arthur & Vassilvitskii 2007).
    """

    def draw(carry, key):
        distance = carry
        row = z[jax.random.categorical(key, jnp.log(distance))]
        with jax.default_matmul_precision("highest"):
            near = 2 - 2 * (z @ row)
            near = jnp.where(near > SEPARATION**2, near, SMALLEST_DISTANCE)
        return jnp.minimum(distance, near), row

    _, rows = jax.lax.scan(draw, jnp.full(z.shape[0], 4.0), jax.random.split(key, size))
    return rows


def reconstruct(
    model: Blip3oConfig, settings: Settings, params: Params, pixels: jax.Array, pool_scale: int = 1
) -> jax.Array:
    """Images f32[B Y X 3] that the pixel head reads from the codes of f32[B P P 3]: p pixels per code."""
    output = _apply(model, params, "encode", pixels, pool_scale)
    return _read_pixels(model, settings, params, _apply(model, params, "decode", output.quantized))


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
            seen, target = _read_pixels(model, settings, params, decoded), pooled_pixels(model, pixels, scale)
            values["pixel"] = pixel_distance(settings.pixels.distance, seen, target)
            values["psnr"] = psnr(seen, target)
        return values

    branches = [functools.partial(at_scale, scale) for scale in settings.pool_scales]
    values = jax.lax.switch(drawn, branches)
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
    # of a (micro-)batch as a whole: with several per step, the mean of theirs
    metrics = {name: (rows * values[name], rows) for name in ("perplexity", "codes_used")}
    metrics["images"] = (rows, jnp.float32(1))
    metrics["code_cosine"] = masked.metric(values["code_cosine"])
    if settings.pixels is not None:
        metrics["psnr"] = masked.metric(values["psnr"], ~bare)
    return terms, metrics


def _code_values(model: Blip3oConfig, output: TATokOutput) -> dict[str, jax.Array]:
    """SimVQ's terms f32[B], and how many codes the batch makes use of."""
    z, codes = output.z, output.codes
    count = jnp.bincount(output.indices.reshape(-1), length=model.image_tokenizer.codebook_size)
    share = count / output.indices.size
    entropy = -jnp.sum(share * jnp.log(jnp.maximum(share, 1e-20)))
    return {
        "codebook": jnp.square(codes - jax.lax.stop_gradient(z)).mean(axis=(1, 2)),
        "commitment": jnp.square(z - jax.lax.stop_gradient(codes)).mean(axis=(1, 2)),
        "code_cosine": jnp.sum(z * codes, axis=-1).mean(axis=1),
        "perplexity": jnp.exp(entropy),  # 1: a single code; Q: all alike
        "codes_used": jnp.mean(count > 0),  # share of the codebook
    }


def _feature_distance(kind: str, features: jax.Array, target: jax.Array) -> jax.Array:
    """f32[B] of f32[B N D]: 1 - cosine, or the mean square of the difference."""
    if kind == "cosine":
        return 1 - jnp.sum(normalize(features) * normalize(target), axis=-1).mean(axis=1)
    return jnp.square(features - target).mean(axis=(1, 2))


def pooled_pixels(model: Blip3oConfig, pixels: jax.Array, scale: int) -> jax.Array:
    """Means over scale x scale pixels of the part of f32[B P P C] that the codes cover: p pixels per code."""
    config = model.image_tokenizer
    side = config.grid_size // scale * scale * config.encoder.patch_size
    return reduce(pixels[:, :side, :side], "B (y p) (x q) C -> B y x C", "mean", p=scale, q=scale)


def _read_pixels(model: Blip3oConfig, settings: Settings, params: Params, features: jax.Array) -> jax.Array:
    return _pixel_head(model, settings).apply({"params": params["pixel_head"]}, features)


def _pixel_head(model: Blip3oConfig, settings: Settings) -> PixelHead:
    c = model.image_tokenizer
    numerics = {"dtype": jnp.dtype(c.dtype), "param_dtype": jnp.dtype(c.param_dtype)}
    return PixelHead(c.encoder.patch_size, settings.pixels.hidden, c.encoder.in_channels, **numerics)


def _apply(model: Blip3oConfig, params: Params, method: str, *inputs):
    return TATok(model.image_tokenizer).apply({"params": params["image_tokenizer"]}, *inputs, method=method)
