"""Rewards for edits: is the instruction carried out, and is everything else unchanged.

What is kept is measured on the first reference image itself, over the part that changed least. Whether the instruction
is carried out has to be known: from metadata in GenEval's schema that describe the image after the edit, or from the
demo world, whose edits are drawn again. Without either, mix `edit_kept` with a reward that judges the instruction.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from blip3o_jax.config import registry
from blip3o_jax.config.schema import Range, convert_value
from blip3o_jax.errors import UserError
from blip3o_jax.evals.editing import EditScore, least_changed
from blip3o_jax.rl.rewards.composition import Composition
from blip3o_jax.types import RewardInput

Inputs = Sequence[RewardInput]
DRAWN = "blip3o_jax.demo.editing:score_named"
"""Scores an image against an edit that can be drawn again."""


class EditKept:
    """In [0, 1]: how much of the untouched region is kept, whether or not the instruction is carried out.

    Args:
      untouched: share of the image that an edit has to leave alone, in (0, 1]; where the ideal edit is known, so is
        the region.
    """

    def __init__(self, untouched: float = 0.5):
        self._untouched = convert_value(Annotated[float, Range(1e-3, 1)], untouched, "edit reward: untouched")

    def check(self, inputs: Inputs) -> None:
        """Raises UserError for prompts without a reference image."""
        _refuse(inputs, lambda one: one.references or origin(one), "a reference image", "use prompts of task edit")

    def scores(self, inputs: Inputs) -> list[EditScore]:
        """One for every image."""
        return [self._score(one) for one in inputs]

    def _score(self, one: RewardInput) -> EditScore:
        if origin(one) is not None:
            return registry.resolve({}, DRAWN, "edit")(origin(one), one.image)
        return EditScore("", False, *least_changed(one.references[0], one.image, self._untouched))

    def __call__(self, inputs: Inputs) -> np.ndarray:
        return np.array([score.kept for score in self.scores(inputs)], np.float32)


class EditPsnr(EditKept):
    """Peak signal-to-noise ratio of the untouched region in dB; 0 where there is none."""

    def __call__(self, inputs: Inputs) -> np.ndarray:
        return np.nan_to_num(np.array([score.psnr for score in self.scores(inputs)], np.float32))


class EditSsim(EditKept):
    """Structural similarity of the untouched region; 0 where there is none."""

    def __call__(self, inputs: Inputs) -> np.ndarray:
        return np.nan_to_num(np.array([score.ssim for score in self.scores(inputs)], np.float32))


class Edit(EditKept):
    """In [0, 1]: whether the instruction is carried out, times how much of the untouched region is kept.

    Args:
      untouched: as for EditKept.
      **detector: as for Composition, of prompts whose metadata describe the image after the edit.
    """

    def __init__(self, untouched: float = 0.5, detector: str = "verifier", model=None, clip=None):
        super().__init__(untouched)
        self._composition = Composition(detector, model, clip)

    def check(self, inputs: Inputs) -> None:
        """Raises UserError for prompts without a reference image, or of which the outcome is not known."""
        super().check(inputs)
        _refuse(
            inputs,
            lambda one: origin(one) or "include" in one.metadata,
            "an edit of the demo world, or GenEval's `include` for the image after the edit",
            "use edit_kept, with a reward that judges the instruction beside it",
        )
        self._composition.check([one for one in inputs if origin(one) is None])

    def __call__(self, inputs: Inputs) -> np.ndarray:
        described = [one for one in inputs if origin(one) is None]
        correct = iter([verdict.correct for verdict in self._composition.verdicts(described)])
        pairs = zip(inputs, self.scores(inputs), strict=True)
        done = [(next(correct) if origin(one) is None else score.fulfilled, score.kept) for one, score in pairs]
        return np.array([fulfilled * kept for fulfilled, kept in done], np.float32)


def origin(one: RewardInput) -> Mapping[str, Any] | None:
    """What an edit can be drawn again from, as the demo world's data source gives it; None for other prompts."""
    known = one.metadata.get("edit")
    return known if isinstance(known, Mapping) and {"index", "seed", "kinds", "split"} <= known.keys() else None


def _refuse(inputs: Inputs, good: Callable[[RewardInput], Any], expected: str, do: str) -> None:
    """Raises UserError for inputs that are not good."""
    bad = [one for one in inputs if not good(one)]
    if bad:
        raise UserError(
            f"edit reward: prompt {bad[0].prompt!r}",
            got=f"metadata {dict(bad[0].metadata)}, {len(bad[0].references)} references ({len(bad)} of {len(inputs)})",
            expected=expected,
            do=do,
        )
