"""A contact sheet of hits and misses: a row per task, what went right framed in green, what went wrong in red."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax.data.images import grid
from blip3o_jax.evals.sheet import captioned

FRAMES = {True: (40, 155, 65), False: (215, 35, 40)}
COLUMNS = 3  # of hits, and as many of misses
SIDE = 64  # pixels that larger images are shown with
_EDGE = 3


def contact_sheet(judged: Sequence[tuple[Mapping[str, Any], Sequence[np.ndarray]]]) -> np.ndarray:
    """Draws the first hits and misses of every task.

    Args:
      judged: rows as `suite.score` makes them, each with its images uint8[Y X 3]: what was given, if anything, and
        what was made of it.

    Returns:
      uint8[Y X 3].
    """
    tasks: dict[tuple, list] = {}
    for row, pictures in judged:
        tasks.setdefault((row["tag"], row.get("version")), []).append((row, pictures))
    lines = []
    for entries in tasks.values():
        blank = np.full_like(_framed(*entries[0]), 255)
        cells = []
        for right in (True, False):
            drawn = [_framed(row, pictures) for row, pictures in entries if row["hit"] == right][:COLUMNS]
            cells += drawn + [blank] * (COLUMNS - len(drawn))
        lines.append(np.concatenate(cells, axis=1))
    return grid(lines, 1)


def _framed(row: Mapping[str, Any], pictures: Sequence[np.ndarray]) -> np.ndarray:
    """One cell: the images over their prompt and what is wrong with them."""
    caption = f"{row['tag']}: {row['prompt'] or row.get('version', '')}"
    reason = row.get("reason", "")
    drawn = captioned(pictures, f"{caption} - {reason}" if reason else caption, SIDE)
    height, width = drawn.shape[:2]
    framed = np.empty((height + 2 * _EDGE, width + 2 * _EDGE, 3), np.uint8)
    framed[:] = FRAMES[bool(row["hit"])]
    framed[_EDGE:-_EDGE, _EDGE:-_EDGE] = drawn
    return framed
