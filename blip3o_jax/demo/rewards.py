"""Rewards that require the ideal result of an edit, which is known in the demo world only."""

from collections.abc import Sequence

import numpy as np

from blip3o_jax.demo.editing import find, likeness
from blip3o_jax.rl.rewards.editing import EditKept, origin, refuse
from blip3o_jax.types import RewardInput


class EditGraded(EditKept):
    """Similarity to the scene after the edit, times the preservation of the untouched region, in [0, 1]."""

    needs_metadata = True

    def check(self, inputs: Sequence[RewardInput]) -> None:
        """Raises UserError for prompts that are not edits of the demo world."""
        refuse(inputs, origin, "an edit of the demo world", "use edit_kept with a reward that judges the instruction")

    def __call__(self, inputs: Sequence[RewardInput]) -> np.ndarray:
        scored = zip(inputs, self.scores(inputs), strict=True)
        return np.array([likeness(find(origin(one)), one.image) * score.kept for one, score in scored], np.float32)
