"""Similarity of an edited image to its reference outside the edited region.

Y X pixels. If an ideal edit is known, the region that it leaves unchanged is compared. Otherwise an edit may change a
given fraction of the image, and the part that changed least is compared.
"""

import dataclasses
import math

import numpy as np
import scipy
from PIL import Image

from blip3o_jax.data.images import SSIM_WINDOW, decibels, psnr, ssim_map, target_pixels, to_uint8

PSNR_CEILING = 60.0  # dB, of equal regions, so that means are finite
PSNR_RANGE = (10.0, 30.0)  # dB of the untouched region at which `EditScore.kept` is 0 and 1
MARGIN = 2  # pixels around changed ones that count as changed
BLOCKS = 32  # blocks along the shorter side of an image, to find the part that changed least


@dataclasses.dataclass(frozen=True)
class EditScore:
    """Scores of one edit."""

    kind: str
    fulfilled: bool  # whether the instruction is carried out
    psnr: float  # dB, of the untouched region; nan if it is empty
    ssim: float  # mean over windows in the untouched region; nan without any

    @property
    def kept(self) -> float:
        """PSNR mapped linearly from PSNR_RANGE to [0, 1]; 1 without an untouched region."""
        low, high = PSNR_RANGE
        return 1.0 if math.isnan(self.psnr) else float(np.clip((self.psnr - low) / (high - low), 0, 1))


def least_changed(reference: np.ndarray, image: np.ndarray, share: float) -> tuple[float, float]:
    """Computes the similarity of the part of an image uint8[Y X 3] that changed least: a fraction in (0, 1] of it.

    The reference, uint8[Y' X' 3], is scaled and centre-cropped to the size of the image, as the model's input is.

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
    error = float(sums.ravel()[least].sum() / sizes.ravel()[least].sum())
    return min(decibels(error), PSNR_CEILING), float(chosen.mean())


def untouched(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Returns the region bool[Y X] that an ideal edit from `source` to `target`, uint8[Y X 3], leaves unchanged."""
    return ~_dilated((source != target).any(axis=-1), MARGIN)


def _dilated(mask: np.ndarray, reach: int) -> np.ndarray:
    """Dilates a mask by a square of side 2 * reach + 1."""
    return scipy.ndimage.binary_dilation(mask, np.ones((2 * reach + 1,) * 2, bool))


def region_psnr(a: np.ndarray, b: np.ndarray, region: np.ndarray) -> float:
    """Returns the PSNR of images uint8[Y X 3] in a region bool[Y X] in dB, at most PSNR_CEILING; nan if it is empty."""
    return min(psnr(a[region], b[region]), PSNR_CEILING) if region.any() else math.nan


def region_ssim(a: np.ndarray, b: np.ndarray, region: np.ndarray) -> float:
    """Returns the mean structural similarity over the windows inside a region bool[Y X]; nan without any."""
    half = SSIM_WINDOW // 2
    whole = ~_dilated(~region, half)[half:-half, half:-half]
    return float(ssim_map(a, b)[whole].mean()) if whole.any() else math.nan
