"""Simple rewards that any working setup can increase, for tests and first runs."""

from collections.abc import Sequence

import numpy as np

from blip3o_jax.types import RewardInput


def redness(inputs: Sequence[RewardInput]) -> np.ndarray:
    """Returns the mean of red minus that of green and blue, float32[N] in [-1, 1]."""
    images = np.stack([one.image for one in inputs])
    red, green, blue = (images[..., channel].mean(axis=(1, 2)) / 255 for channel in range(3))
    return (red - (green + blue) / 2).astype(np.float32)


def brightness(inputs: Sequence[RewardInput]) -> np.ndarray:
    """Returns the mean of all pixels, float32[N] in [0, 1]."""
    return (np.stack([one.image for one in inputs]).mean(axis=(1, 2, 3)) / 255).astype(np.float32)
