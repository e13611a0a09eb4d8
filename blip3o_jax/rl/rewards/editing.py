"""Rewards for edits: whether the instruction is carried out, and how much of the rest of the image is unchanged.

Preservation is measured against the first reference image, over the part that changed least. Whether the instruction is
carried out follows from metadata in GenEval's schema that describe the image after the edit; edits of the demo world
are compared with their ideal result. Without either, combine `edit_kept` with a reward that judges the instruction.
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
"""Function that scores an image against an edit of the demo world."""


class EditKept:
    """Preservation of the untouched region in [0, 1], whether or not the instruction is carried out.

    Args:
      untouched: fraction of the image, in (0, 1], that an edit must leave unchanged; not used for edits of the demo
        world, whose untouched region is known.

    Attributes:
      measure: field of `EditScore` that is the reward.
    """

    measure = "kept"

    def __init__(self, untouched: float = 0.5):
        self._untouched = convert_value(Annotated[float, Range(1e-3, 1)], untouched, "edit reward: untouched")

    def check(self, inputs: Inputs) -> None:
        """Raises UserError for prompts without a reference image."""
        refuse(inputs, lambda one: one.references or origin(one), "a reference image", "use prompts of task edit")

    def scores(self, inputs: Inputs) -> list[EditScore]:
        """Returns the scores of every image."""
        return [self._score(one) for one in inputs]

    def _score(self, one: RewardInput) -> EditScore:
        if origin(one) is not None:
            return registry.resolve({}, DRAWN, "edit")(origin(one), one.image)
        return EditScore("", False, *least_changed(one.references[0], one.image, self._untouched))

    def __call__(self, inputs: Inputs) -> np.ndarray:
        return np.nan_to_num(np.array([getattr(score, self.measure) for score in self.scores(inputs)], np.float32))


class EditPsnr(EditKept):
    """PSNR of the untouched region in dB; 0 if it is empty."""

    measure = "psnr"


class EditSsim(EditKept):
    """Structural similarity of the untouched region; 0 if it is empty."""

    measure = "ssim"


class Edit(EditKept):
    """Preservation of the untouched region in [0, 1] if the instruction is carried out, else 0.

    Args:
      untouched: as for EditKept.
      detector, model, clip: as for Composition, for prompts whose metadata describe the image after the edit.
    """

    needs_metadata = True

    def __init__(self, untouched: float = 0.5, detector: str = "verifier", model=None, clip=None):
        super().__init__(untouched)
        self._composition = Composition(detector, model, clip)

    def check(self, inputs: Inputs) -> None:
        """Raises UserError for prompts without a reference image, or without a known result."""
        super().check(inputs)
        refuse(
            inputs,
            lambda one: origin(one) or "include" in one.metadata,
            "an edit of the demo world, or GenEval's `include` for the image after the edit",
            "use edit_kept with a reward that judges the instruction",
        )
        self._composition.check([one for one in inputs if origin(one) is None])

    def __call__(self, inputs: Inputs) -> np.ndarray:
        described = [one for one in inputs if origin(one) is None]
        correct = iter([verdict.correct for verdict in self._composition.verdicts(described)])
        pairs = zip(inputs, self.scores(inputs), strict=True)
        done = [(next(correct) if origin(one) is None else score.fulfilled, score.kept) for one, score in pairs]
        return np.array([fulfilled * kept for fulfilled, kept in done], np.float32)


def origin(one: RewardInput) -> Mapping[str, Any] | None:
    """Returns the origin of an edit of the demo world, see `demo.editing.find`; None for other prompts."""
    known = one.metadata.get("edit")
    return known if isinstance(known, Mapping) and {"index", "seed", "kinds", "split"} <= known.keys() else None


def refuse(inputs: Inputs, good: Callable[[RewardInput], Any], expected: str, do: str) -> None:
    """Raises UserError if `good` is false for one of the inputs."""
    bad = [one for one in inputs if not good(one)]
    if bad:
        raise UserError(
            f"edit reward: prompt {bad[0].prompt!r}",
            got=f"metadata {dict(bad[0].metadata)}, {len(bad[0].references)} references ({len(bad)} of {len(inputs)})",
            expected=expected,
            do=do,
        )
