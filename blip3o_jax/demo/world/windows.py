"""Area resampling of windows of an image, and extents with subpixel precision. Y X pixels, N M cells."""

import numpy as np


def resample(window: np.ndarray, box: tuple[float, float, float, float], cells: tuple[int, int]) -> np.ndarray:
    """Averages a box of a window float[Y X], taken to be 0 outside, over the cells of a grid.

    The box is x0, y0, x1, y1 in pixels of the window; `cells` are rows N and columns M of the result, float[N M].
    """
    x0, y0, x1, y1 = box
    return _overlaps(y0, y1, cells[0], window.shape[0]) @ window @ _overlaps(x0, x1, cells[1], window.shape[1]).T


def _overlaps(start: float, end: float, cells: int, pixels: int) -> np.ndarray:
    """Returns the fraction of every cell that each pixel covers: float[cells pixels]."""
    edges = np.linspace(start, end, cells + 1)[:, None]
    position = np.arange(pixels)
    covered = np.minimum(edges[1:], position + 1) - np.maximum(edges[:-1], position)
    return np.maximum(covered, 0) * (cells / max(end - start, 1e-6))


def extent(profile: np.ndarray) -> tuple[float, float]:
    """Returns start and end, with subpixel precision, of the part above 0.5 of a profile float[X], coverage in [0, 1].

    The profile is at least 0.5 somewhere.
    """
    above = np.flatnonzero(profile >= 0.5)
    i, j = int(above[0]), int(above[-1])
    before = profile[i - 1] if i > 0 else 0.0
    after = profile[j + 1] if j + 1 < len(profile) else 0.0
    return float(i + 1 - profile[i] - before), float(j + profile[j] + after)
