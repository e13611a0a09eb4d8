"""Consistency rules of a model's geometry: heads and widths, levels, ids, and total size.

A rule is `(holds, field, its value, what was expected)`. Rules are generated and checked in order, so one may rely on
those before it.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from blip3o_jax.errors import require

if TYPE_CHECKING:
    from blip3o_jax.config.model import Blip3oConfig, DCAEConfig, DecoderConfig, SanaConfig, TATokConfig, ViTConfig

MOST_PARAMETERS = 10**12
MOST_LEVELS = 12
Rule = tuple[bool, str, Any, str]
Rules = Iterator[Rule]


def check(rules: Rules) -> None:
    """Raises UserError for the first rule that does not hold."""
    for holds, name, got, expected in rules:
        require(holds, name, got, expected, "change one of them")


def decoder(config: "DecoderConfig") -> Rules:
    """Generates the rules of a decoder."""
    heads, kv = config.num_heads, config.num_kv_heads
    yield heads % kv == 0, "decoder.num_heads", heads, f"a multiple of num_kv_heads {kv}"
    yield config.head_dim % 2 == 0, "decoder.head_dim", config.head_dim, "an even number, for rotary positions"
    layer = config.head_dim * (2 * heads + 2 * kv) + 3 * config.mlp_dim
    yield _size("decoder", config.width * (config.vocab_size + config.depth * layer))


def vit(config: "ViTConfig") -> Rules:
    """Generates the rules of a vision tower."""
    width, positions = config.width, config.num_positions
    yield width % config.num_heads == 0, "width", width, f"a multiple of num_heads {config.num_heads}"
    yield math.isqrt(positions) ** 2 == positions, "num_positions", positions, "a square number"
    layers, patch = config.depth * (4 * width + 2 * config.mlp_dim), config.in_channels * config.patch_size**2
    yield _size("vision tower", width * (positions + patch + layers))


def image_tokenizer(config: "TATokConfig") -> Rules:
    """Generates the rules by which tower, bottleneck and decoder of an image tokenizer fit together."""
    name, side, patch = "image_tokenizer.image_size", config.image_size, config.encoder.patch_size
    positions, bottleneck, inputs = config.encoder.num_positions, config.bottleneck_dim, config.decoder.in_channels
    yield side >= patch, name, side, f"at least encoder.patch_size {patch}"
    yield (side // patch) ** 2 == positions, name, side, f"{positions} patches of {patch} pixels in it"
    yield inputs == bottleneck, "image_tokenizer.decoder.in_channels", inputs, f"bottleneck_dim {bottleneck}"
    yield _size("image_tokenizer.codebook_size * bottleneck_dim", config.codebook_size * bottleneck)


def autoencoder(config: "DCAEConfig") -> Rules:
    """Generates the rules by which the levels of an autoencoder can be built."""
    names, depth = ("channels", "layers", "blocks", "multiscales"), len(config.encoder_channels)
    for side in ("encoder", "decoder"):
        channels, layers, blocks, scales = (getattr(config, f"{side}_{name}") for name in names)
        where = f"autoencoder.{side}"
        counts = [len(value) for value in (channels, layers, blocks, scales)]
        listed = ", ".join(f"{count} {name}" for count, name in zip(counts, names))
        yield set(counts) == {depth}, where, listed, f"{depth} of each, one per level"
        yield 1 <= depth <= MOST_LEVELS, f"{where}_channels", f"{depth} levels", f"1 to {MOST_LEVELS}"
        yield 0 not in layers[1:], f"{where}_layers", layers, "blocks at every level but the first"
        for width, block, sizes in zip(channels, blocks, scales):
            known = block in ("ResBlock", "EfficientViTBlock")
            yield known, f"{where}_blocks", repr(block), "ResBlock or EfficientViTBlock"
            divides = block == "ResBlock" or width % config.head_dim == 0
            expected = f"a multiple of head_dim {config.head_dim} in a level with attention"
            yield divides, f"{where}_channels", width, expected
            yield all(size % 2 for size in sizes), f"{where}_multiscales", sizes, "odd sizes of kernels"
        deepest, latent = channels[-1], config.latent_channels
        yield deepest % latent == 0, f"{where}_channels", deepest, f"a multiple of latent_channels {latent} at the end"
        yield _size(where, sum(24 * count * width**2 for count, width in zip(layers, channels)))


def sana(config: "SanaConfig") -> Rules:
    """Generates the rules of a SANA transformer."""
    inputs, outputs, width = config.in_channels, config.out_channels, config.width
    yield outputs == inputs, "dit.out_channels", outputs, f"in_channels {inputs}"
    hidden = int(config.mlp_ratio * width)
    yield hidden >= 1, "dit.mlp_ratio", config.mlp_ratio, f"at least one channel at width {width}"
    block = width * (4 * width + 4 * config.num_cross_heads * config.cross_head_dim + 3 * hidden + 6)
    yield _size("dit", config.depth * block + width * (8 * width + config.caption_channels))


def model(config: "Blip3oConfig") -> Rules:
    """Generates the rules by which the parts of a model fit together."""
    ids, tokenizer, rows, latent = config.tokens, config.image_tokenizer, config.decoder.vocab_size, config.autoencoder
    for name, got, other, expected in (
        ("connector.in_width", config.connector.in_width, "decoder.width", config.decoder.width),
        ("connector.width", config.connector.width, "dit.caption_channels", config.dit.caption_channels),
        ("dit.in_channels", config.dit.in_channels, "autoencoder.latent_channels", latent.latent_channels),
        ("tokens.num_image_tokens", ids.num_image_tokens, "image_tokenizer.codebook_size", tokenizer.codebook_size),
    ):
        yield got == expected, name, got, f"{expected}, the value of {other}"
    for name, last in (
        ("image_start_tag", ids.image_start_tag),
        ("image_end_tag", ids.image_end_tag),
        ("pad", ids.pad),
        ("scale_start", ids.scale_start + ids.num_scales - 1),
        ("image_start", ids.image_start + ids.num_image_tokens - 1),
    ):
        yield last < rows, f"tokens.{name}", f"ids up to {last}", f"ids within decoder.vocab_size {rows}"
    scales, factor = min(ids.num_scales, tokenizer.grid_size), latent.spatial_factor
    yield 1 <= config.pool_scale <= scales, "pool_scale", config.pool_scale, f"1 to {scales}"
    yield config.image_size % factor == 0, "image_size", config.image_size, f"a multiple of {factor}"


def _size(what: str, parameters: float) -> Rule:
    """Returns the rule that bounds the size of a part."""
    return parameters <= MOST_PARAMETERS, what, f"about {parameters:.2g} parameters", f"at most {MOST_PARAMETERS:.0e}"
