"""Consistency rules of a model's geometry: heads and widths, levels, ids, and total size.

Every function raises UserError for the first rule that a part violates.
"""

import math
from typing import TYPE_CHECKING, Any

from blip3o_jax.errors import require

if TYPE_CHECKING:
    from blip3o_jax.config.model import Blip3oConfig, DCAEConfig, DecoderConfig, SanaConfig, TATokConfig, ViTConfig

MOST_PARAMETERS = 10**12
MOST_LEVELS = 12


def decoder(config: "DecoderConfig") -> None:
    """Checks a decoder."""
    heads, kv = config.num_heads, config.num_kv_heads
    _check(heads % kv == 0, "decoder.num_heads", heads, f"a multiple of num_kv_heads {kv}")
    _check(config.head_dim % 2 == 0, "decoder.head_dim", config.head_dim, "an even number, for rotary positions")
    layer = config.head_dim * (2 * heads + 2 * kv) + 3 * config.mlp_dim
    _check_size("decoder", config.width * (config.vocab_size + config.depth * layer))


def vit(config: "ViTConfig") -> None:
    """Checks a vision tower."""
    width, positions = config.width, config.num_positions
    _check(width % config.num_heads == 0, "width", width, f"a multiple of num_heads {config.num_heads}")
    _check(math.isqrt(positions) ** 2 == positions, "num_positions", positions, "a square number")
    layers, patch = config.depth * (4 * width + 2 * config.mlp_dim), config.in_channels * config.patch_size**2
    _check_size("vision tower", width * (positions + patch + layers))


def image_tokenizer(config: "TATokConfig") -> None:
    """Checks that tower, bottleneck and decoder of an image tokenizer fit together."""
    name, side, patch = "image_tokenizer.image_size", config.image_size, config.encoder.patch_size
    positions, bottleneck, inputs = config.encoder.num_positions, config.bottleneck_dim, config.decoder.in_channels
    _check(side >= patch, name, side, f"at least encoder.patch_size {patch}")
    _check((side // patch) ** 2 == positions, name, side, f"{positions} patches of {patch} pixels in it")
    _check(inputs == bottleneck, "image_tokenizer.decoder.in_channels", inputs, f"bottleneck_dim {bottleneck}")
    _check_size("image_tokenizer.codebook_size * bottleneck_dim", config.codebook_size * bottleneck)


def autoencoder(config: "DCAEConfig") -> None:
    """Checks that the levels of an autoencoder can be built."""
    names, depth = ("channels", "layers", "blocks", "multiscales"), len(config.encoder_channels)
    for side in ("encoder", "decoder"):
        channels, layers, blocks, scales = (getattr(config, f"{side}_{name}") for name in names)
        where = f"autoencoder.{side}"
        counts = [len(value) for value in (channels, layers, blocks, scales)]
        listed = ", ".join(f"{count} {name}" for count, name in zip(counts, names))
        _check(set(counts) == {depth}, where, listed, f"{depth} of each, one per level")
        _check(1 <= depth <= MOST_LEVELS, f"{where}_channels", f"{depth} levels", f"1 to {MOST_LEVELS}")
        _check(0 not in layers[1:], f"{where}_layers", layers, "blocks at every level but the first")
        for width, block, sizes in zip(channels, blocks, scales):
            known = block in ("ResBlock", "EfficientViTBlock")
            _check(known, f"{where}_blocks", repr(block), "ResBlock or EfficientViTBlock")
            divides = block == "ResBlock" or width % config.head_dim == 0
            expected = f"a multiple of head_dim {config.head_dim} in a level with attention"
            _check(divides, f"{where}_channels", width, expected)
            _check(all(size % 2 for size in sizes), f"{where}_multiscales", sizes, "odd sizes of kernels")
        deepest, latent = channels[-1], config.latent_channels
        _check(
            deepest % latent == 0, f"{where}_channels", deepest, f"a multiple of latent_channels {latent} at the end"
        )
        _check_size(where, sum(24 * count * width**2 for count, width in zip(layers, channels)))


def sana(config: "SanaConfig") -> None:
    """Checks a SANA transformer."""
    inputs, outputs, width = config.in_channels, config.out_channels, config.width
    _check(outputs == inputs, "dit.out_channels", outputs, f"in_channels {inputs}")
    hidden = int(config.mlp_ratio * width)
    _check(hidden >= 1, "dit.mlp_ratio", config.mlp_ratio, f"at least one channel at width {width}")
    block = width * (4 * width + 4 * config.num_cross_heads * config.cross_head_dim + 3 * hidden + 6)
    _check_size("dit", config.depth * block + width * (8 * width + config.caption_channels))


def model(config: "Blip3oConfig") -> None:
    """Checks that the parts of a model fit together."""
    ids, tokenizer, rows, latent = config.tokens, config.image_tokenizer, config.decoder.vocab_size, config.autoencoder
    for name, got, other, expected in (
        ("connector.in_width", config.connector.in_width, "decoder.width", config.decoder.width),
        ("connector.width", config.connector.width, "dit.caption_channels", config.dit.caption_channels),
        ("dit.in_channels", config.dit.in_channels, "autoencoder.latent_channels", latent.latent_channels),
        ("tokens.num_image_tokens", ids.num_image_tokens, "image_tokenizer.codebook_size", tokenizer.codebook_size),
    ):
        _check(got == expected, name, got, f"{expected}, the value of {other}")
    for name, last in (
        ("image_start_tag", ids.image_start_tag),
        ("image_end_tag", ids.image_end_tag),
        ("pad", ids.pad),
        ("scale_start", ids.scale_start + ids.num_scales - 1),
        ("image_start", ids.image_start + ids.num_image_tokens - 1),
    ):
        _check(last < rows, f"tokens.{name}", f"ids up to {last}", f"ids within decoder.vocab_size {rows}")
    scales, factor = min(ids.num_scales, tokenizer.grid_size), latent.spatial_factor
    _check(1 <= config.pool_scale <= scales, "pool_scale", config.pool_scale, f"1 to {scales}")
    _check(config.image_size % factor == 0, "image_size", config.image_size, f"a multiple of {factor}")


def _check(holds: bool, name: str, got: Any, expected: str) -> None:
    require(holds, name, got, expected, "change one of them")


def _check_size(what: str, parameters: float) -> None:
    got = f"about {parameters:.2g} parameters"
    _check(parameters <= MOST_PARAMETERS, what, got, f"at most {MOST_PARAMETERS:.0e}")
