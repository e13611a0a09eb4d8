"""A reward that looks at the reference image: the edit has to keep its colours, as a histogram sees them.

    python train.py --config=configs/grpo.py:edit_demo --workdir=DIR \\
        --config.rl.rewards="({'name': 'examples.reward:Palette', 'options': {'bins': 4}, 'weight': 1.0},)"

A reward is a function of a list of `RewardInput`, or a class that is made of its options once. `check`, which may be
left out, refuses prompts that it cannot judge before anything is sampled: their image is None then.
"""

from collections.abc import Sequence

import numpy as np

from blip3o_jax.errors import UserError
from blip3o_jax.types import RewardInput


class Palette:
    """Overlap in [0, 1] of the colour histograms of an image and its first reference.

    Args:
      bins: of each channel, 2 to 256.
    """

    def __init__(self, bins: int = 8):
        if not 2 <= bins <= 256:
            raise UserError("palette reward: bins", got=bins, expected="2 to 256", do="choose a value in this range")
        self._bins = bins

    def check(self, inputs: Sequence[RewardInput]) -> None:
        """Raises UserError for prompts without a reference image."""
        bare = [one.prompt for one in inputs if not one.references]
        if bare:
            raise UserError(
                "palette reward", got=f"{bare[0]!r}", expected="a reference image", do="use prompts of task edit"
            )

    def __call__(self, inputs: Sequence[RewardInput]) -> list[float]:
        """A number for every image."""
        return [self._overlap(one.image, one.references[0]) for one in inputs]

    def _overlap(self, image: np.ndarray, reference: np.ndarray) -> float:
        return float(np.minimum(self._shares(image), self._shares(reference)).sum())

    def _shares(self, image: np.ndarray) -> np.ndarray:
        """Shares of the pixels of uint8[Y X 3] by colour: float[bins bins bins]."""
        counts, _ = np.histogramdd(image.reshape(-1, 3), bins=self._bins, range=[(0, 256)] * 3)
        return counts / counts.sum()
