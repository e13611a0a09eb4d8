"""Pixel shuffling, and parameter-free shortcuts for up- and downsampling.

B batch, Y X pixels, C channels, f factor. Channels are ordered as in torch: channel c * f * f + dy * f + dx holds pixel
(dy, dx) of a cell of channel c.

Source: DC-AE (arXiv 2410.10733) section 3.2; torch `pixel_shuffle`, diffusers `DCDownBlock2d`, `DCUpBlock2d`.
"""

import jax
from einops import rearrange, reduce, repeat


def pixel_unshuffle(x: jax.Array, factor: int = 2) -> jax.Array:
    """[B Y X C] -> [B Y/f X/f C*f*f]."""
    return rearrange(x, "B (y dy) (x dx) C -> B y x (C dy dx)", dy=factor, dx=factor)


def pixel_shuffle(x: jax.Array, factor: int = 2) -> jax.Array:
    """[B y x C*f*f] -> [B y*f x*f C]; inverts `pixel_unshuffle`."""
    return rearrange(x, "B y x (C dy dx) -> B (y dy) (x dx) C", dy=factor, dx=factor)


def average_channels(x: jax.Array, features: int) -> jax.Array:
    """[B Y X C] -> [B Y X features] by averaging C / features consecutive channels."""
    return reduce(x, "B Y X (F group) -> B Y X F", "mean", F=features)


def repeat_channels(x: jax.Array, features: int) -> jax.Array:
    """[B Y X C] -> [B Y X features] by repeating every channel features / C times."""
    return repeat(x, "B Y X C -> B Y X (C times)", times=features // x.shape[-1])


def downsample_shortcut(x: jax.Array, features: int) -> jax.Array:
    """[B Y X C] -> [B Y/2 X/2 features] by unshuffling pixels and averaging channels."""
    return average_channels(pixel_unshuffle(x), features)


def upsample_shortcut(x: jax.Array, features: int) -> jax.Array:
    """[B y x C] -> [B 2y 2x features] by repeating channels and shuffling pixels."""
    return pixel_shuffle(repeat_channels(x, 4 * features))
