"""GenEval's rules as rewards: requested objects, counts, colours and positions.

Metadata follow GenEval's schema. Options say who looks at the images: `detector`, with `model` and `clip`, as for
`blip3o_jax.evals geneval`; by default the demo world's verifier, which knows nothing of photographs.
"""

import functools
from collections.abc import Sequence

import numpy as np

from blip3o_jax.detection import Detector
from blip3o_jax.evals import detectors
from blip3o_jax.evals.geneval import Verdict, check_metadata, judge
from blip3o_jax.types import RewardInput

Inputs = Sequence[RewardInput]


class Composition:
    """Judges images by what a detector finds in them.

    Args:
      detector: a key of `evals.detectors.DETECTORS`, or `package.module:attribute`.
      model, clip: names or directories of its networks; None for the usual ones.
    """

    def __init__(self, detector: str = "verifier", model: str | None = None, clip: str | None = None):
        self._name, self._detector = detector, _opened(detector, model, clip)

    def check(self, inputs: Inputs) -> None:
        """Raises UserError for metadata that do not follow GenEval's schema or ask for what the detector cannot find.

        The detector is loaded once all are known.
        """
        for one in inputs:
            check_metadata(one.metadata, f"prompt {one.prompt!r}")
        detectors.check_known([one.metadata for one in inputs], self._detector, self._name)
        if inputs:
            _load(self._detector)

    def verdicts(self, inputs: Inputs) -> list[Verdict]:
        """One for every image."""
        thresholds = detectors.thresholds_of(self._detector)
        return [judge(self._detector(one.image), one.metadata, thresholds) for one in inputs]


class GenEval(Composition):
    """The continuous reward, at most 1: exact counts, colours, positions; what was not asked for does no harm."""

    def __call__(self, inputs: Inputs) -> np.ndarray:
        return np.array([verdict.reward for verdict in self.verdicts(inputs)], np.float32)


class GenEvalStrict(Composition):
    """1 for exactly what was asked and nothing else, 0 otherwise."""

    def __call__(self, inputs: Inputs) -> np.ndarray:
        return np.array([verdict.strict for verdict in self.verdicts(inputs)], np.float32)


class GenEvalOfficial(Composition):
    """1 where the benchmark's own rule holds, 0 otherwise."""

    def __call__(self, inputs: Inputs) -> np.ndarray:
        return np.array([verdict.correct for verdict in self.verdicts(inputs)], np.float32)


@functools.lru_cache(maxsize=2)
def _opened(name: str, model: str | None, clip: str | None) -> Detector:
    """Rewards with the same detector share its networks."""
    return detectors.open_detector(name, model, clip)


@functools.lru_cache(maxsize=2)
def _load(detector: Detector) -> None:
    detectors.load(detector)
