"""Similarity of an edited image to its reference, outside the changed region.

Shapes: Y X pixels. Where an ideal edit is known, a pixel is untouched if the images before and after it agree. Where
none is, an edit may change a share of the image: what is compared is the rest, the part that changed least.
"""

import dataclasses
import math

import numpy as np
from PIL import Image

from blip3o_jax.data.images import SSIM_WINDOW, ssim_map, target_pixels, to_uint8

PSNR_CEILING = 60.0  # dB, for regions that are equal to the last bit, so that means exist
PSNR_RANGE = (10.0, 30.0)  # dB of the untouched region that count as nothing kept and as all kept
MARGIN = 2  # pixels around a changed one that count as changed
BLOCKS = 32  # along the shorter side, for what changed least


@dataclasses.dataclass(frozen=True)
class EditScore:
    """How well one edit was carried out."""

    kind: str
    fulfilled: bool
    psnr: float  # dB, of the untouched region against the source
    ssim: float  # of the windows that lie in the untouched region; nan without any

    @property
    def kept(self) -> float:
        """Share in [0, 1] of the untouched region that is kept, linear in dB over PSNR_RANGE; 1 where there is none."""
        low, high = PSNR_RANGE
        return 1.0 if math.isnan(self.psnr) else float(np.clip((self.psnr - low) / (high - low), 0, 1))


def least_changed(reference: np.ndarray, image: np.ndarray, share: float) -> tuple[float, float]:
    """Similarity of the part of an image that changed least.

    Args:
      reference: uint8[Y' X' 3], fitted to the image as the model's input is: scaled to cover it, the middle cut out.
      image: uint8[Y X 3].
      share: of the image, in (0, 1], that is compared.

    Returns:
      PSNR in dB, at most PSNR_CEILING, and mean structural similarity.
    """
    height, width = image.shape[:2]
    if reference.shape != image.shape:
        reference = to_uint8(target_pixels(Image.fromarray(reference), height, width))
    side = -(-min(height, width) // BLOCKS)
    error = np.square(image.astype(np.float64) - reference).mean(axis=-1)
    rows, columns = np.arange(0, height, side), np.arange(0, width, side)
    sums = np.add.reduceat(np.add.reduceat(error, rows, axis=0), columns, axis=1)
    sizes = np.outer(np.diff([*rows, height]), np.diff([*columns, width]))
    order = np.argsort((sums / sizes).ravel(), kind="stable")
    least = order[: math.ceil(share * len(order))]
    similar = np.sort(ssim_map(image, reference).mean(axis=-1).ravel())[::-1]
    chosen = similar[: math.ceil(share * len(similar))]
    return _decibels(float(sums.ravel()[least].sum() / sizes.ravel()[least].sum())), float(chosen.mean())


def _decibels(error: float) -> float:
    return PSNR_CEILING if error == 0 else min(10 * math.log10(255**2 / error), PSNR_CEILING)


def untouched(source: np.ndarray, target: np.ndarray, margin: int = MARGIN) -> np.ndarray:
    """Finds the region that an ideal edit leaves alone.

    Args:
      source, target: uint8[Y X 3], before and after the ideal edit.
      margin: pixels around a changed one that count as changed.

    Returns:
      bool[Y X].
    """
    return ~_dilated((source != target).any(axis=-1), margin)


def _dilated(mask: np.ndarray, reach: int) -> np.ndarray:
    """Grows a mask by a square of half side `reach`."""
    padded = np.pad(mask, reach)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1))
    return windows.any(axis=(2, 3))


def region_psnr(a: np.ndarray, b: np.ndarray, region: np.ndarray) -> float:
    """Peak signal-to-noise ratio within a region, in dB, at most PSNR_CEILING; nan for an empty region."""
    if not region.any():
        return math.nan
    return _decibels(float(np.mean((a[region].astype(np.float64) - b[region].astype(np.float64)) ** 2)))


def region_ssim(a: np.ndarray, b: np.ndarray, region: np.ndarray) -> float:
    """Mean structural similarity over the windows that lie wholly in a region; nan without any."""
    half = SSIM_WINDOW // 2
    whole = ~_dilated(~region, half)[half:-half, half:-half]
    return float(ssim_map(a, b)[whole].mean()) if whole.any() else math.nan
