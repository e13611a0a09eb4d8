"""GenEval's rules as rewards: requested objects, counts, colours and positions.

Metadata follow GenEval's schema. The default detector is that of the demo world; photographs need another one.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from blip3o_jax.errors import require
from blip3o_jax.evals import detectors
from blip3o_jax.evals.geneval import Verdict, check_metadata, judge
from blip3o_jax.types import RewardInput

Inputs = Sequence[RewardInput]


class Composition:
    """Base class of the rewards: applies GenEval's rules to detections.

    Args:
      detector: a key of `evals.detectors.DETECTORS`, or `package.module:attribute`.
      model, clip: names or directories of its networks; None for the defaults.

    Attributes:
      rule: field of `Verdict` that is the reward.
    """

    rule: ClassVar[str]
    needs_metadata = True

    def __init__(self, detector: str = "verifier", model: str | None = None, clip: str | None = None):
        self._name, self._detector = detector, detectors.open_detector(detector, model, clip)

    def check(self, inputs: Inputs) -> None:
        """Raises UserError for metadata outside GenEval's schema or the detector's vocabulary; loads the detector."""
        for one in inputs:
            where = f"prompt {one.prompt!r}"
            do = "give them in a prompts file, or choose another reward"
            require(one.metadata, f"{where}: GenEval metadata", "none", "tag, include and prompt", do)
            check_metadata(one.metadata, where)
        detectors.check_known([one.metadata for one in inputs], self._detector, self._name)
        if inputs:
            detectors.load(self._detector)

    def verdicts(self, inputs: Inputs) -> list[Verdict]:
        """Returns the verdict on every image."""
        thresholds = detectors.thresholds_of(self._detector)
        return [judge(self._detector(one.image), one.metadata, thresholds) for one in inputs]

    def __call__(self, inputs: Inputs) -> np.ndarray:
        return np.array([getattr(verdict, self.rule) for verdict in self.verdicts(inputs)], np.float32)


class GenEval(Composition):
    """The continuous reward, at most 1: exact counts, colours and positions; other objects are ignored."""

    rule = "reward"


class GenEvalStrict(Composition):
    """1 if the image shows exactly the requested objects, else 0."""

    rule = "strict"


class GenEvalOfficial(Composition):
    """1 by the official rule of the benchmark, else 0."""

    rule = "correct"
