"""A contact sheet of the demo world: pictures with their captions, edits as pictures before and after."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from blip3o_jax.world import edits, prompts
from blip3o_jax.world.render import render

_CELL = 192
_LINES = 3
_LINE_HEIGHT = 15
_PAD = 8


def cell(pictures: list[np.ndarray], caption: str) -> np.ndarray:
    """Sets pictures side by side over their caption.

    Args:
      pictures: uint8[S S 3], shown 192 pixels wide.
      caption: at most three lines are shown.

    Returns:
      uint8[Y X 3].
    """
    width = len(pictures) * (_CELL + _PAD) + _PAD
    sheet = Image.new("RGB", (width, _CELL + 2 * _PAD + _LINES * _LINE_HEIGHT + 4), "white")
    for number, picture in enumerate(pictures):
        shown = Image.fromarray(picture).resize((_CELL, _CELL), Image.Resampling.NEAREST)
        sheet.paste(shown, (_PAD + number * (_CELL + _PAD), _PAD))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    lines = textwrap.wrap(caption, width // 7)[:_LINES]
    for number, line in enumerate(lines):
        draw.text((_PAD, _CELL + 2 * _PAD + number * _LINE_HEIGHT), line, fill=(40, 40, 40), font=font)
    return np.asarray(sheet)


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
        cells = [cell([render(sample.scene, size)], sample.caption) for sample in samples]
        cells.append(cell([render(edit.source, size), render(edit.target, size)], edit.instruction))
        strips.append(np.concatenate(cells, axis=1))
    return np.concatenate(strips)
