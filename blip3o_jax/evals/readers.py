"""What reads the text of a picture: a table from name to what opens a reader."""

import functools
from collections.abc import Callable

import numpy as np
from PIL import Image

from blip3o_jax.errors import UserError
from blip3o_jax.world.reader import read_text

Reader = Callable[[np.ndarray], str]
"""uint8[Y X 3] -> all that is read, "" for nothing."""

LEGIBLE = 512  # least side in pixels of what the engine sees: smaller pictures are enlarged


def _open_world() -> Reader:
    return read_text


def _open_rapidocr() -> Reader:
    try:
        import onnxruntime  # noqa: F401  (what the engine runs on; it complains of its absence only when it reads)
        from rapidocr import RapidOCR
    except ImportError as error:
        raise UserError(
            f"reader rapidocr: {error}",
            expected="the package",
            do="pip install 'blip3o_jax[ocr]', which brings its models",
        ) from error
    engine = RapidOCR(params={"Global.log_level": "error"})

    def read(image: np.ndarray) -> str:
        height, width = image.shape[:2]
        scale = LEGIBLE / min(height, width)
        if scale > 1:
            size = round(width * scale), round(height * scale)
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
        return " ".join(engine(np.ascontiguousarray(image[..., ::-1])).txts or ())  # it expects blue first

    return read


READERS = {"world": _open_world, "rapidocr": _open_rapidocr}
"""Name -> function that opens a reader: of the demo world's signs, of photographs."""


@functools.lru_cache(maxsize=2)
def open_reader(name: str) -> Reader:
    """Opens a reader by name; it stays open.

    Raises:
      UserError: an unknown name, or a library that is missing.
    """
    if name not in READERS:
        raise UserError("reader", got=f"{name!r}", expected=f"one of {', '.join(READERS)}", do="correct the name")
    return READERS[name]()
