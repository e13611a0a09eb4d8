"""What an object detector answers, so that scorers and detectors do not need to know each other.

Boxes are in pixels of the picture, x to the right, y down, as [x0, y0, x1, y1].
"""

import dataclasses
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Detection:
    """One object found in a picture."""

    label: str  # class name in the vocabulary of the prompts' metadata
    color: str  # colour name, or "" where the detector cannot tell
    box: tuple[float, float, float, float]
    score: float  # confidence in [0, 1]

    @property
    def center(self) -> tuple[float, float]:
        """Middle of the box, in pixels."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


class Detector(Protocol):
    """Finds the objects of a picture: the demo world's verifier, or a network for photographs."""

    def __call__(self, image: np.ndarray) -> list[Detection]:
        """uint8[Y X 3] -> detections, the most confident first, weak ones included."""


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
