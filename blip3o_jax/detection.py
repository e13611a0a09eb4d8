"""The interfaces of object detectors and text readers.

Boxes are [x0, y0, x1, y1] in pixels, x to the right, y down.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Protocol

import numpy as np

from blip3o_jax.errors import require, type_of

POSITION_THRESHOLD = 0.1  # fraction of the sizes of two boxes within which their offset is ignored


@dataclasses.dataclass(frozen=True)
class Detection:
    """One object found in an image; raises UserError for a box or score that is not finite, or has another shape."""

    label: str  # class name in the vocabulary of the prompts' metadata
    color: str  # colour name, or "" if unknown
    box: tuple[float, float, float, float]  # or an array of them
    score: float  # confidence in [0, 1]

    def __post_init__(self):
        numbers = np.array([*self.box, self.score], float).tolist()
        good = len(numbers) == 5 and all(map(math.isfinite, numbers))
        require(good, f"detection of {self.label}", f"box and score {numbers}", "five finite numbers", "correct them")
        object.__setattr__(self, "box", tuple(numbers[:4]))
        object.__setattr__(self, "score", numbers[4])

    @property
    def center(self) -> tuple[float, float]:
        """Middle of the box, in pixels."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Lowest confidence of detections that count."""

    counting: float
    others: float

    def of(self, task: str) -> float:
        """Returns the threshold of one task."""
        return self.counting if task == "counting" else self.others


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Classes and colours that a detector knows. Prompts with others are refused before sampling.

    Raises UserError for fields of another type.
    """

    classes: Mapping[str, int]  # class name -> maximum number of objects that are counted in one image
    colors: Collection[str]  # colour names; empty: the detector does not classify colours

    def __post_init__(self):
        counted = isinstance(self.classes, Mapping) and all(isinstance(most, int) for most in self.classes.values())
        require(counted, "vocabulary: classes", type_of(self.classes), "a dictionary of numbers", "correct it")
        several = isinstance(self.colors, Collection) and not isinstance(self.colors, str)
        require(several, "vocabulary: colors", type_of(self.colors), "a list of names", "correct it")


class Detector(Protocol):
    """Finds the objects in an image.

    Implemented by a class with arguments `(model=None, clip=None)`, names or directories of its networks. Construction
    is cheap: `load` or the first call reads the networks. `thresholds` and `load` are optional.
    """

    vocabulary: Vocabulary
    thresholds: Thresholds

    def load(self) -> str:
        """Loads the networks; returns a note on the detector's validation, for reports."""

    def __call__(self, image: np.ndarray) -> list[Detection]:
        """Detects objects: uint8[Y X 3] -> detections by falling confidence, including weak ones."""


class Reader(Protocol):
    """Reads the text in an image. Implemented by a class without arguments whose construction is cheap."""

    alphabet: Collection[str] | None  # characters that it can read, in either case; None: any

    def __call__(self, image: np.ndarray) -> str:
        """Reads text: uint8[Y X 3] -> all text found, "" if none."""


def relative_position(box: tuple[float, ...], other: tuple[float, ...]) -> set[str]:
    """Returns the position of a box (x0, y0, x1, y1) relative to another, by GenEval's rule.

    The offset of the centres is reduced by POSITION_THRESHOLD times the sum of the sizes along each axis; a direction
    holds if it contributes more than half of the remaining distance.

    Returns:
      At most two of "left of", "right of", "above", "below".
    """
    corners, other_corners = (np.asarray(b[:4], float).reshape(2, 2) for b in (box, other))
    offset = corners.mean(axis=0) - other_corners.mean(axis=0)
    sizes = np.abs(corners[1] - corners[0]) + np.abs(other_corners[1] - other_corners[0])
    beyond = np.maximum(np.abs(offset) - POSITION_THRESHOLD * sizes, 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    right, down = beyond / np.linalg.norm(offset)
    holds = {"left of": right < -0.5, "right of": right > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, true in holds.items() if true}
