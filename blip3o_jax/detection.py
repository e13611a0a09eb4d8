"""The interface of object detectors and text readers: what they return and what they can judge.

Boxes are in pixels of the image, x to the right, y down, as [x0, y0, x1, y1].
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Detection:
    """One object found in an image."""

    label: str  # class name in the vocabulary of the prompts' metadata
    color: str  # colour name, or "" where the detector cannot tell
    box: tuple[float, float, float, float]
    score: float  # confidence in [0, 1]

    @property
    def center(self) -> tuple[float, float]:
        """Middle of the box, in pixels."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Least confidence of a detection that counts."""

    counting: float
    others: float

    def of(self, task: str) -> float:
        """The threshold of one task."""
        return self.counting if task == "counting" else self.others


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a detector can find: what it cannot is refused before anything is computed, not scored 0."""

    classes: Mapping[str, int]  # name -> most objects of it that are distinguished in one image
    colors: Collection[str]  # names of colours; empty: it tells none


class Detector(Protocol):
    """Finds the objects of an image.

    A class of `(model=None, clip=None)`, names or directories of its networks, whose instances are cheap to make:
    networks are read by `load`, or by the first call. `thresholds` and `load` may be left out.
    """

    vocabulary: Vocabulary
    thresholds: Thresholds

    def load(self) -> str:
        """Prepares the detector; returns what vouches for it."""

    def __call__(self, image: np.ndarray) -> list[Detection]:
        """uint8[Y X 3] -> detections, the most confident first, weak ones included."""


class Reader(Protocol):
    """Reads the text of an image; a class without arguments, whose instances are cheap to make."""

    alphabet: Collection[str] | None  # characters that it can read, upper or lower case; None: any

    def __call__(self, image: np.ndarray) -> str:
        """uint8[Y X 3] -> all that is read, "" for nothing."""


def relative_position(box: tuple[float, ...], other: tuple[float, ...], threshold: float = 0.1) -> set[str]:
    """Says where one box stands as seen from another, by GenEval's rule.

    The offset of the middles is shortened by `threshold` times the sum of the sizes, axis by axis, and a direction
    holds where it makes up more than half of the distance.

    Args:
      box, other: x0, y0, x1, y1.
      threshold: share of the sizes that counts as no offset.

    Returns:
      Some of "left of", "right of", "above", "below"; up to two, or none.
    """
    corners, other_corners = (np.asarray(b[:4], float).reshape(2, 2) for b in (box, other))
    offset = corners.mean(axis=0) - other_corners.mean(axis=0)
    sizes = np.abs(corners[1] - corners[0]) + np.abs(other_corners[1] - other_corners[0])
    beyond = np.maximum(np.abs(offset) - threshold * sizes, 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    right, down = beyond / np.linalg.norm(offset)
    holds = {"left of": right < -0.5, "right of": right > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, true in holds.items() if true}
