"""Rewards that need to know the ideal outcome of an edit, as only the demo world does."""

from collections.abc import Sequence

import numpy as np

from blip3o_jax.demo.editing import find, likeness
from blip3o_jax.errors import UserError
from blip3o_jax.rl.rewards.editing import EditKept, origin
from blip3o_jax.types import RewardInput


class EditGraded(EditKept):
    """In [0, 1]: how nearly the image shows the scene after the edit, times how much is kept."""

    def check(self, inputs: Sequence[RewardInput]) -> None:
        """Raises UserError for prompts that are no edits of the demo world."""
        unknown = [one.prompt for one in inputs if origin(one) is None]
        if unknown:
            raise UserError(
                "edit_graded reward",
                got=f"{unknown[0]!r} ({len(unknown)} of {len(inputs)} prompts)",
                expected="an edit of the demo world",
                do="use edit_kept, with a reward that judges the instruction beside it",
            )

    def __call__(self, inputs: Sequence[RewardInput]) -> np.ndarray:
        scored = zip(inputs, self.scores(inputs), strict=True)
        return np.array([likeness(find(origin(one)), one.image) * score.kept for one, score in scored], np.float32)
