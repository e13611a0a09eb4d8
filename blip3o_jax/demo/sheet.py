"""Contact sheets of samples of the demo world, and of correct and incorrect images of a model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from blip3o_jax.data.images import grid
from blip3o_jax.demo.world import edits, prompts
from blip3o_jax.demo.world.render import render
from blip3o_jax.evals.sheet import captioned

FRAMES = {True: (40, 155, 65), False: (215, 35, 40)}  # RGB of the frames of correct and incorrect images
COLUMNS = 3  # correct images per task, and as many incorrect ones
SIDE = 64  # pixels that larger images are reduced to
_EDGE = 3


def preview(seed: int = 0, size: int = 64) -> np.ndarray:
    """Draws samples of the world, rendered at `size` pixels: a row per task, with a column of edits, one kind per row.

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
    """Draws the first correct and incorrect images of every task in the result of `examination.run_suite`.

    Returns:
      uint8[Y X 3], one row per task.
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
    """Draws a cell: images above prompt and reason, in a frame that shows whether the result is correct."""
    caption = f"{row['tag']}: {row['prompt'] or row.get('version', '')}"
    reason = row.get("reason", "")
    drawn = captioned(images, f"{caption} - {reason}" if reason else caption, SIDE)
    return np.asarray(ImageOps.expand(Image.fromarray(drawn), _EDGE, FRAMES[bool(row["hit"])]))
