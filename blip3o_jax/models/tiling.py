"""Encodes and decodes large images in overlapping tiles, so that device memory does not grow with the image.

Full tiles share one compiled program; tiles at the right and lower edges may be smaller. B batch, Y X positions of the
input (pixels or latent cells), C channels.

Source: diffusers `AutoencoderDC.tiled_encode`, `.tiled_decode`, with the same defaults and cross-fade.
Differs from the reference: images whose sides are not multiples of a latent cell are refused, not padded.
"""

from collections.abc import Callable
from fractions import Fraction

import jax
import numpy as np

from blip3o_jax.errors import UserError, require

Function = Callable[[jax.Array | np.ndarray], jax.Array]


def tiled_encode(encode: Function, pixels: np.ndarray, tile: int = 512, stride: int = 448) -> np.ndarray:
    """Encodes images of any size.

    Args:
      encode: f32[B Y X 3] -> f32[B y x C] for Y, X up to `tile`, such as a jitted `DCAE.encode`.
      pixels: f32[B Y X 3].
      tile: side of a tile in pixels.
      stride: offset between tiles in pixels; tiles overlap by the rest.

    Returns:
      Latents f32[B y x C] on the host.

    Raises:
      UserError: tile or stride are not multiples of a latent cell, or the stride exceeds the tile.
    """
    return _tiled(encode, pixels, tile, stride)


def tiled_decode(decode: Function, latent: np.ndarray, tile: int = 16, stride: int = 14) -> np.ndarray:
    """Decodes latents of any size.

    Args:
      decode: f32[B y x C] -> f32[B Y X 3] for y, x up to `tile`, such as a jitted `DCAE.decode`.
      latent: f32[B y x C].
      tile: side of a tile in latent cells.
      stride: offset between tiles in latent cells; tiles overlap by the rest.

    Returns:
      Images f32[B Y X 3] on the host.

    Raises:
      UserError: the stride exceeds the tile.
    """
    return _tiled(decode, latent, tile, stride)


def _tiled(function: Function, x: np.ndarray, tile: int, stride: int) -> np.ndarray:
    require(0 < stride <= tile, "tiles", f"stride {stride} and side {tile}", "1 <= stride <= side", "change one")
    if max(x.shape[1:3]) <= tile:
        return np.asarray(function(x), np.float32)
    bands, above = [], None
    for top in range(0, x.shape[1], stride):
        tiles = []
        for left in range(0, x.shape[2], stride):
            window = x[:, top : top + tile, left : left + tile]
            out = np.array(function(window), np.float32)
            step, overlap = _output_sizes(window.shape[1], out.shape[1], tile, stride)
            if above is not None:
                _cross_fade(above[len(tiles)], out, overlap, axis=1)
            if tiles:
                _cross_fade(tiles[-1], out, overlap, axis=2)
            tiles.append(out)
        bands.append(np.concatenate([out[:, :step, :step] for out in tiles], axis=2))
        above = tiles
    return np.concatenate(bands, axis=1)


def _output_sizes(size: int, out_size: int, tile: int, stride: int) -> tuple[int, int]:
    """Returns stride and overlap in positions of the output."""
    scale = Fraction(out_size, size)
    step, overlap = stride * scale, (tile - stride) * scale
    if step.denominator > 1:
        raise UserError(
            "tiles",
            got=f"side {tile} and stride {stride}",
            expected=f"multiples of {scale.denominator}, the side of a latent cell",
            do="round them",
        )
    return int(step), int(overlap)


def _cross_fade(before: np.ndarray, out: np.ndarray, overlap: int, axis: int) -> None:
    """Cross-fades the end of `before` into the start of `out`, in place, linearly over `overlap` positions."""
    overlap = min(before.shape[axis], out.shape[axis], overlap)
    shape = [1, 1, 1, 1]
    shape[axis] = overlap
    weight = (np.arange(overlap, dtype=np.float32) / overlap).reshape(shape)
    end, start = [slice(None)] * 4, [slice(None)] * 4
    end[axis], start[axis] = slice(before.shape[axis] - overlap, None), slice(0, overlap)
    out[tuple(start)] = before[tuple(end)] * (1 - weight) + out[tuple(start)] * weight
