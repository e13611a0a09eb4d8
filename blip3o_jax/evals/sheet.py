"""Cells of contact sheets: images side by side above a caption."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_CELL = 192
_LINES = 3
_LINE_HEIGHT = 15
_PAD = 8


def captioned(images: Sequence[np.ndarray], caption: str, side: int | None = None) -> np.ndarray:
    """Draws images uint8[Y X 3] side by side, 192 pixels wide, above their caption, which is cut after three lines.

    `side` is a size in pixels that larger images are reduced to before; None: no reduction.

    Returns:
      uint8[Y X 3].
    """
    width = len(images) * (_CELL + _PAD) + _PAD
    sheet = Image.new("RGB", (width, _CELL + 2 * _PAD + _LINES * _LINE_HEIGHT + 4), "white")
    for number, pixels in enumerate(images):
        image = Image.fromarray(pixels)
        if side is not None and image.height > side:
            image = image.resize((side, side), Image.Resampling.BICUBIC)
        shown = image.resize((_CELL, _CELL), Image.Resampling.NEAREST)
        sheet.paste(shown, (_PAD + number * (_CELL + _PAD), _PAD))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for number, line in enumerate(textwrap.wrap(caption, width // 7)[:_LINES]):
        draw.text((_PAD, _CELL + 2 * _PAD + number * _LINE_HEIGHT), line, fill=(40, 40, 40), font=font)
    return np.asarray(sheet)
