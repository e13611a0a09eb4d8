"""Contact sheets: samples of the demo world, and the hits and misses of a model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax.data.images import grid
from blip3o_jax.demo.world import edits, prompts
from blip3o_jax.demo.world.render import render
from blip3o_jax.evals.sheet import captioned

FRAMES = {True: (40, 155, 65), False: (215, 35, 40)}  # of hits and misses
COLUMNS = 3  # of hits, and as many of misses
SIDE = 64  # pixels that larger images are brought to first
_EDGE = 3


def preview(seed: int = 0, size: int = 64) -> np.ndarray:
    """Draws samples of the world: a composition task a row, and a column of edits, one kind a row.

    Args:
      size: side of the images in pixels before they are enlarged.

    Returns:
      uint8[Y X 3].
    """
    strips = []
    for row, (task, kind) in enumerate(zip(prompts.TASKS, edits.KINDS)):
        samples = [prompts.sample(4 * row + column, seed, {task: 1.0}) for column in range(4)]
        edit = edits.sample(row, seed, {kind: 1.0})
        cells = [captioned([render(sample.scene, size)], sample.caption) for sample in samples]
        cells.append(captioned([render(edit.source, size), render(edit.target, size)], edit.instruction))
        strips.append(np.concatenate(cells, axis=1))
    return np.concatenate(strips)


def contact_sheet(judged: Sequence[tuple[Mapping[str, Any], Sequence[np.ndarray]]]) -> np.ndarray:
    """Draws the first hits and misses of every task, a task a row.

    Args:
      judged: rows as `suite.score` makes them, each with its images uint8[Y X 3]: what was given, if anything, and
        what was made of it.

    Returns:
      uint8[Y X 3].
    """
    tasks: dict[tuple, list] = {}
    for row, images in judged:
        tasks.setdefault((row["tag"], row.get("version")), []).append((row, images))
    lines = []
    for entries in tasks.values():
        blank = np.full_like(_framed(*entries[0]), 255)
        cells = []
        for right in (True, False):
            drawn = [_framed(row, images) for row, images in entries if row["hit"] == right][:COLUMNS]
            cells += drawn + [blank] * (COLUMNS - len(drawn))
        lines.append(np.concatenate(cells, axis=1))
    return grid(lines, 1)


def _framed(row: Mapping[str, Any], images: Sequence[np.ndarray]) -> np.ndarray:
    """One cell: the images over their prompt and what is wrong with them, in a frame of the verdict's colour."""
    caption = f"{row['tag']}: {row['prompt'] or row.get('version', '')}"
    reason = row.get("reason", "")
    drawn = captioned(images, f"{caption} - {reason}" if reason else caption, SIDE)
    height, width = drawn.shape[:2]
    framed = np.empty((height + 2 * _EDGE, width + 2 * _EDGE, 3), np.uint8)
    framed[:] = FRAMES[bool(row["hit"])]
    framed[_EDGE:-_EDGE, _EDGE:-_EDGE] = drawn
    return framed
