"""A stroke font of capital letters for signs of few pixels.

A letter is a set of polylines on a grid 4 wide and 6 high, y down. Corners are cut instead of rounded, so that letters
stay distinguishable when blurred; I has serifs to be as wide as other letters.
"""

import functools

import numpy as np

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_ROUND = ((4, 1.3), (2.8, 0), (1.2, 0), (0, 1.3), (0, 4.7), (1.2, 6), (2.8, 6), (4, 4.7))
_BOWL = ((0, 6), (0, 0), (2.9, 0), (4, 1), (4, 2.4), (2.9, 3.4), (0, 3.4))

STROKES: dict[str, tuple[tuple[tuple[float, float], ...], ...]] = {
    "A": (((0, 6), (2, 0), (4, 6)), ((0.7, 4.1), (3.3, 4.1))),
    "B": (
        ((0, 3), (0, 0), (2.7, 0), (3.7, 0.9), (3.7, 2.1), (2.7, 3), (0, 3), (0, 6)),
        ((0, 6), (2.8, 6), (4, 5), (4, 4), (2.7, 3)),
    ),
    "C": (_ROUND,),
    "D": (((0, 0), (2.3, 0), (4, 1.7), (4, 4.3), (2.3, 6), (0, 6), (0, 0)),),
    "E": (((4, 0), (0, 0), (0, 6), (4, 6)), ((0, 3), (3.2, 3))),
    "F": (((4, 0), (0, 0), (0, 6)), ((0, 3), (3.2, 3))),
    "G": ((*_ROUND, (4, 3.3), (2.3, 3.3)),),
    "H": (((0, 0), (0, 6)), ((4, 0), (4, 6)), ((0, 3), (4, 3))),
    "I": (((0.6, 0), (3.4, 0)), ((2, 0), (2, 6)), ((0.6, 6), (3.4, 6))),
    "J": (((1.4, 0), (4, 0), (4, 4.6), (2.8, 6), (1.2, 6), (0, 4.7)),),
    "K": (((0, 0), (0, 6)), ((4, 0), (0, 3.7)), ((1.4, 2.5), (4, 6))),
    "L": (((0, 0), (0, 6), (4, 6)),),
    "M": (((0, 6), (0, 0), (2, 3.4), (4, 0), (4, 6)),),
    "N": (((0, 6), (0, 0), (4, 6), (4, 0)),),
    "O": ((*_ROUND, (4, 1.3)),),
    "P": (_BOWL,),
    "Q": ((*_ROUND, (4, 1.3)), ((2.3, 4), (4.3, 6.4))),
    "R": (_BOWL, ((1.7, 3.4), (4, 6))),
    "S": (
        ((4, 1.1), (2.9, 0), (1.1, 0), (0, 1), (0, 2), (1, 2.9)),
        ((1, 2.9), (3, 3.1), (4, 4), (4, 5), (2.9, 6), (1.1, 6), (0, 4.9)),
    ),
    "T": (((0, 0), (4, 0)), ((2, 0), (2, 6))),
    "U": (((0, 0), (0, 4.7), (1.2, 6), (2.8, 6), (4, 4.7), (4, 0)),),
    "V": (((0, 0), (2, 6), (4, 0)),),
    "W": (((0, 0), (0.8, 6), (2, 2.6), (3.2, 6), (4, 0)),),
    "X": (((0, 0), (4, 6)), ((4, 0), (0, 6))),
    "Y": (((0, 0), (2, 3), (4, 0)), ((2, 3), (2, 6))),
    "Z": (((0, 0), (4, 0), (0, 6), (4, 6)),),
}


def segment_distance(x: np.ndarray, y: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Returns the distance float[Y X] of points to the segment between `start` and `end`, float[2] (x, y)."""
    (ax, ay), (bx, by) = start, end
    t = np.clip(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2), 0, 1)
    return np.hypot(x - ax - t * (bx - ax), y - ay - t * (by - ay))


@functools.lru_cache(maxsize=512)
def glyph(letter: str, width: float, height: float, stroke: float) -> np.ndarray:
    """Draws one of LETTERS, with the size of the box around its strokes and their thickness in pixels.

    Returns:
      Coverage float32[Y X] in [0, 1], with the size of the box rounded up.
    """
    y, x = np.mgrid[: int(np.ceil(height)), : int(np.ceil(width))] + 0.5
    nearest = np.full(y.shape, np.inf)
    half = stroke / 2
    for line in STROKES[letter]:
        points = np.array(line) / (4, 6) * (width - stroke, height - stroke) + half
        for start, end in zip(points[:-1], points[1:]):
            nearest = np.minimum(nearest, segment_distance(x, y, start, end))
    return np.clip(half + 0.5 - nearest, 0, 1).astype(np.float32)
