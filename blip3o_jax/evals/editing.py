"""Scores of edited pictures: is the instruction carried out, and is everything else as it was.

Shapes: Y X pixels. A pixel is untouched where the pictures before and after an ideal edit agree, and outside of objects
that the instruction asks for, wherever and however large the edited picture shows them; both with a margin.
"""

import dataclasses
import math

import numpy as np

from blip3o_jax.data.images import SSIM_WINDOW, ssim_map
from blip3o_jax.world.edits import Edit, asked_for, fulfilled
from blip3o_jax.world.render import render
from blip3o_jax.world.verifier import detect

PSNR_CEILING = 60.0  # dB, for regions that are equal to the last bit, so that means exist
MARGIN = 2  # pixels around a changed one that count as changed


@dataclasses.dataclass(frozen=True)
class EditScore:
    """How well one edit was carried out."""

    kind: str
    fulfilled: bool
    psnr: float  # dB, of the untouched region against the source
    ssim: float  # of the windows that lie in the untouched region; nan without any


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
    error = float(np.mean((a[region].astype(np.float64) - b[region].astype(np.float64)) ** 2))
    return PSNR_CEILING if error == 0 else min(10 * math.log10(255**2 / error), PSNR_CEILING)


def region_ssim(a: np.ndarray, b: np.ndarray, region: np.ndarray) -> float:
    """Mean structural similarity over the windows that lie wholly in a region; nan without any."""
    half = SSIM_WINDOW // 2
    whole = ~_dilated(~region, half)[half:-half, half:-half]
    return float(ssim_map(a, b)[whole].mean()) if whole.any() else math.nan


def score_edit(edit: Edit, image: np.ndarray) -> EditScore:
    """Scores one picture against the demo world's edit that it should show.

    Args:
      edit: instruction, scene before and scene after.
      image: uint8[S S 3], what a model made of it.
    """
    source, target = render(edit.source, len(image)), render(edit.target, len(image))
    region, found = untouched(source, target), detect(image)
    for seen in asked_for(edit, image, found):
        left, top, right, bottom = (int(edge) for edge in seen.box)
        region[max(top - MARGIN, 0) : bottom + MARGIN + 1, max(left - MARGIN, 0) : right + MARGIN + 1] = False
    done = fulfilled(edit, image, found)
    return EditScore(edit.kind, done, region_psnr(image, source, region), region_ssim(image, source, region))
