"""Reads the letters of the demo world's signs in any image.

The dark neutral strokes are cut into letters at the empty columns between them; each is the letter of the font that
it correlates with best. Of large and narrow letters those are read that correlate better. Shapes: Y X pixels.
"""

import functools
import itertools

import numpy as np
from PIL import Image, ImageFilter

from blip3o_jax.demo.world import font, windows
from blip3o_jax.demo.world.scenes import LARGE_LETTERS, NARROW_LETTERS, Lettering
from blip3o_jax.demo.world.verifier import INK_DARKNESS, Picture

UNREADABLE = "?"

_CELLS = (18, 12)
_SHIFTS = (-0.08, 0.0, 0.08)  # of a letter in its box, in heights and widths
_BLURS = (0.0, 1.2)  # of the templates, standard deviations in pixels
_EDGE = 4  # empty pixels around a template before it is blurred
_LEAST_MATCH = 0.6


def read_text(image: np.ndarray) -> str:
    """Reads the sign of an image.

    Args:
      image: uint8[Y X 3], any size.

    Returns:
      Its letters from left to right, `?` for one that resembles no letter; "" without a sign.
    """
    picture = Picture(image)
    if picture.letter_box is None:
        return ""
    x0, y0, x1, y1 = picture.letter_box
    ink = picture.ink[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1]
    ink = (ink / max(np.percentile(ink, 95), INK_DARKNESS)).clip(0, 1)  # specks may fill less than a twentieth
    return max((_read(ink, letters) for letters in (LARGE_LETTERS, NARROW_LETTERS)), key=lambda found: found[1])[0]


def _read(ink: np.ndarray, letters: Lettering) -> tuple[str, float]:
    """The text and the mean match of its letters."""
    rows = windows.extent(ink.max(axis=1))
    found = [_recognise(ink, span, rows, letters) for span in _spans(ink, letters)]
    return "".join(letter for letter, _ in found), float(np.mean([match for _, match in found] or [0.0]))


def _spans(ink: np.ndarray, letters: Lettering) -> list[tuple[float, float]]:
    """First and last column of every letter; letters that touch are cut at equal widths."""
    columns = np.flatnonzero(np.diff(np.pad(ink.max(axis=0) > 0.4, 1).astype(np.int8)))
    spans = []
    for start, end in zip(columns[::2].tolist(), columns[1::2].tolist()):
        if spans and end - spans[-1][0] <= letters.width + 1:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    result = []
    for start, end in spans:
        if end - start < 0.4 * letters.width:
            continue
        parts = max(round((end - start + letters.pitch - letters.width) / letters.pitch), 1)
        pieces = np.linspace(start, end, parts + 1)
        result += list(zip(pieces[:-1].tolist(), pieces[1:].tolist()))
    return result


def _recognise(ink: np.ndarray, span: tuple[float, float], rows: tuple[float, float], letters: Lettering):
    """The best letter, UNREADABLE where it resembles none, and how well it matches."""
    middle = (span[0] + span[1]) / 2
    box = (middle - letters.width / 2, rows[0], middle + letters.width / 2, rows[1])
    cells = windows.resample(ink, box, _CELLS).ravel()
    cells = cells - cells.mean()
    match = _templates(letters) @ cells / max(float(np.linalg.norm(cells)), 1e-6)
    best = int(match.argmax())
    letter = font.LETTERS[best // (len(_BLURS) * len(_SHIFTS) ** 2)]
    return (letter if match[best] >= _LEAST_MATCH else UNREADABLE), float(match[best])


@functools.lru_cache(maxsize=2)
def _templates(letters: Lettering) -> np.ndarray:
    """Unit vectors without mean of every letter, sharp and blurred, at every shift: float[26*2*9 N*M]."""
    rows = []
    for letter, blur, down, right in itertools.product(font.LETTERS, _BLURS, _SHIFTS, _SHIFTS):
        mask = font.glyph(letter, letters.width, letters.height, letters.stroke)
        image = Image.fromarray(np.rint(255 * np.pad(mask, _EDGE)).astype(np.uint8))
        blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)), np.float32)
        height, width = mask.shape
        left, top = _EDGE - right * width, _EDGE - down * height
        cells = windows.resample(blurred, (left, top, left + width, top + height), _CELLS).ravel()
        cells = cells - cells.mean()
        rows.append(cells / np.linalg.norm(cells))
    return np.array(rows)
