"""Text reader for signs of the demo world.

Dark neutral strokes are cut into letters at empty columns; each letter is the one of the font with the highest
correlation. Large and narrow lettering are both tried, and the better match is returned. Y X pixels.
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
_SHIFTS = (-0.08, 0.0, 0.08)  # of templates, relative to the size of the box
_BLURS = (0.0, 1.2)  # of templates, standard deviations in pixels
_EDGE = 4  # padding of a template before blurring, in pixels
_LEAST_MATCH = 0.6


def read_text(image: np.ndarray) -> str:
    """Reads the sign in an image uint8[Y X 3] of any size.

    Returns:
      The letters from left to right, `?` for unreadable ones; "" without a sign.
    """
    picture = Picture(image)
    if picture.letter_box is None:
        return ""
    x0, y0, x1, y1 = picture.letter_box
    ink = picture.ink[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1]
    darkest = max(np.percentile(ink, 95), INK_DARKNESS)  # the percentile is 0 if strokes fill less than 5 %
    ink = (ink / darkest).clip(0, 1)
    rows, texts = windows.extent(ink.max(axis=1)), []
    for letters in (LARGE_LETTERS, NARROW_LETTERS):
        found = [_recognise(ink, span, rows, letters) for span in _spans(ink, letters)]
        match = np.mean([match for _, match in found] or [0.0])
        texts.append((match, "".join(letter for letter, _ in found)))
    return max(texts, key=lambda found: found[0])[1]


def _spans(ink: np.ndarray, letters: Lettering) -> list[tuple[float, float]]:
    """Returns first and last column of every letter; touching letters are cut into equal widths."""
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
    """Returns the best letter, or UNREADABLE, and its correlation."""
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
    """Returns normalised templates of all letters, blurs and shifts: float[26*2*9 N*M]."""
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
