"""Rewards that any working set-up must be able to raise, whatever the prompts: for tests and first runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def redness(prompts: Sequence[str], images: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Mean of red less that of green and blue, in [-1, 1]."""
    del prompts, metadata
    red, green, blue = (images[..., channel].mean(axis=(1, 2)) / 255 for channel in range(3))
    return (red - (green + blue) / 2).astype(np.float32)


def brightness(prompts: Sequence[str], images: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Mean of all pixels, in [0, 1]."""
    del prompts, metadata
    return (images.mean(axis=(1, 2, 3)) / 255).astype(np.float32)
