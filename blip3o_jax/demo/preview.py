"""A contact sheet of the demo world: pictures with their captions, edits as pictures before and after."""

import numpy as np

from blip3o_jax.demo.world import edits, prompts
from blip3o_jax.demo.world.render import render
from blip3o_jax.evals.sheet import captioned


def contact_sheet(seed: int = 0, rows: int = 7, size: int = 64) -> np.ndarray:
    """Draws samples of all tasks, one task a row, and a column of edits, one kind a row.

    Args:
      seed: of the samples.
      rows: rows, at most one per task.
      size: side of the pictures in pixels before they are enlarged.

    Returns:
      uint8[Y X 3].
    """
    tasks, kinds = tuple(prompts.TASKS)[:rows], tuple(edits.KINDS)[:rows]
    strips = []
    for row, (task, kind) in enumerate(zip(tasks, kinds)):
        samples = [prompts.sample(4 * row + column, seed, {task: 1.0}) for column in range(4)]
        edit = edits.sample(row, seed, {kind: 1.0})
        cells = [captioned([render(sample.scene, size)], sample.caption) for sample in samples]
        cells.append(captioned([render(edit.source, size), render(edit.target, size)], edit.instruction))
        strips.append(np.concatenate(cells, axis=1))
    return np.concatenate(strips)
