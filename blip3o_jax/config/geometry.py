"""Consistency checks of a model's geometry: heads and widths, levels, ids, and total size.

A rule is `(holds, field, its value, what was expected)`; the first rule that does not hold raises UserError.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from blip3o_jax.errors import require

if TYPE_CHECKING:
    from blip3o_jax.config.model import Blip3oConfig, DCAEConfig, DecoderConfig, SanaConfig, TATokConfig, ViTConfig

MOST_PARAMETERS = 10**12
MOST_LEVELS = 12


def check(rules: Iterable[tuple[bool, str, Any, str]]) -> None:
    """Raises UserError for the first rule that does not hold."""
    for holds, name, got, expected in rules:
        require(holds, name, got, expected, "change one of them")


def check_decoder(config: "DecoderConfig") -> None:
    """Raises UserError if heads do not divide or the size is absurd."""
    heads, kv = config.num_heads, config.num_kv_heads
    attention = config.head_dim * (2 * heads + 2 * kv)
    check(
        [
            (heads % kv == 0, "decoder.num_heads", heads, f"a multiple of num_kv_heads {kv}"),
            (config.head_dim % 2 == 0, "decoder.head_dim", config.head_dim, "an even number, for rotary positions"),
            _size("decoder", config.width * (config.vocab_size + config.depth * (attention + 3 * config.mlp_dim))),
        ]
    )


def check_vit(config: "ViTConfig") -> None:
    """Raises UserError if heads do not divide, positions form no square, or the size is absurd."""
    width, positions = config.width, config.num_positions
    layers = config.depth * (4 * width + 2 * config.mlp_dim)
    patch = config.in_channels * config.patch_size**2
    check(
        [
            (width % config.num_heads == 0, "width", width, f"a multiple of num_heads {config.num_heads}"),
            (math.isqrt(positions) ** 2 == positions, "num_positions", positions, "a square number"),
            _size("vision tower", width * (positions + patch + layers)),
        ]
    )


def check_image_tokenizer(config: "TATokConfig") -> None:
    """Raises UserError if tower, bottleneck and decoder of an image tokenizer do not fit together."""
    side, patch = config.image_size, config.encoder.patch_size
    bottleneck, inputs = config.bottleneck_dim, config.decoder.in_channels
    positions, grid = config.encoder.num_positions, side // patch
    check(
        [
            (side >= patch, "image_tokenizer.image_size", side, f"at least encoder.patch_size {patch}"),
            (grid**2 == positions, "image_tokenizer.image_size", side, f"{positions} patches of {patch} pixels in it"),
            (inputs == bottleneck, "image_tokenizer.decoder.in_channels", inputs, f"bottleneck_dim {bottleneck}"),
            _size("image_tokenizer.codebook_size * bottleneck_dim", config.codebook_size * bottleneck),
        ]
    )


def check_autoencoder(config: "DCAEConfig") -> None:
    """Raises UserError if the levels of an autoencoder cannot be built."""
    for side in ("encoder", "decoder"):
        check(_level_rules(config, side))


def _level_rules(config: "DCAEConfig", side: str) -> Iterable[tuple[bool, str, Any, str]]:
    names = ("channels", "layers", "blocks", "multiscales")
    channels, layers, blocks, scales = (getattr(config, f"{side}_{name}") for name in names)
    depth, where = len(config.encoder_channels), f"autoencoder.{side}"
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


def check_sana(config: "SanaConfig") -> None:
    """Raises UserError if input and output channels differ or the size is absurd."""
    width, cross = config.width, config.num_cross_heads * config.cross_head_dim
    hidden = int(config.mlp_ratio * width)
    block = width * (4 * width + 4 * cross + 3 * hidden + 6)
    check(
        [
            (
                config.out_channels == config.in_channels,
                "dit.out_channels",
                config.out_channels,
                f"in_channels {config.in_channels}",
            ),
            (hidden >= 1, "dit.mlp_ratio", config.mlp_ratio, f"at least one channel at width {width}"),
            _size("dit", config.depth * block + width * (8 * width + config.caption_channels)),
        ]
    )


def check_model(config: "Blip3oConfig") -> None:
    """Raises UserError if two parts of a model do not fit together."""
    ids, tokenizer, decoder, latent = config.tokens, config.image_tokenizer, config.decoder, config.autoencoder
    equal = [
        ("connector.in_width", config.connector.in_width, "decoder.width", decoder.width),
        ("connector.width", config.connector.width, "dit.caption_channels", config.dit.caption_channels),
        ("dit.in_channels", config.dit.in_channels, "autoencoder.latent_channels", latent.latent_channels),
        ("tokens.num_image_tokens", ids.num_image_tokens, "image_tokenizer.codebook_size", tokenizer.codebook_size),
    ]
    for name, got, other, expected in equal:
        require(got == expected, name, got, f"{expected}, the value of {other}", "make them equal")
    rows = decoder.vocab_size
    last = {
        "image_start_tag": ids.image_start_tag,
        "image_end_tag": ids.image_end_tag,
        "pad": ids.pad,
        "scale_start": ids.scale_start + ids.num_scales - 1,
        "image_start": ids.image_start + ids.num_image_tokens - 1,
    }
    inside = f"ids within decoder.vocab_size {rows}"
    check((value < rows, f"tokens.{name}", f"ids up to {value}", inside) for name, value in last.items())
    scales, factor = min(ids.num_scales, tokenizer.grid_size), latent.spatial_factor
    check(
        [
            (1 <= config.pool_scale <= scales, "pool_scale", config.pool_scale, f"1 to {scales}"),
            (config.image_size % factor == 0, "image_size", config.image_size, f"a multiple of {factor}"),
        ]
    )


def _size(what: str, parameters: float) -> tuple[bool, str, Any, str]:
    """Returns the rule that bounds the size of a part."""
    return parameters <= MOST_PARAMETERS, what, f"about {parameters:.2g} parameters", f"at most {MOST_PARAMETERS:.0e}"
