"""Text readers by name, and the check of texts against their alphabet."""

import functools
from collections.abc import Collection, Sequence

import numpy as np
from PIL import Image

from blip3o_jax.config import registry
from blip3o_jax.detection import Reader
from blip3o_jax.errors import UserError, require
from blip3o_jax.evals.text import normalize

RAPIDOCR = "use the reader rapidocr (--reader, or options {'reader': 'rapidocr'}), pip install 'blip3o_jax[ocr]'"
ANOTHER = "name a reader of your own as package.module:attribute, or leave the text out"
LEGIBLE = 512  # shorter side in pixels that smaller images are enlarged to


class RapidOcr:
    """The OCR engine RapidOCR, for photographs; see `detection.Reader`."""

    longest = None

    def __init__(self):
        try:
            import onnxruntime  # noqa: F401  (the engine imports it on first use only)
            from rapidocr import RapidOCR
        except ImportError as error:
            do = "pip install 'blip3o_jax[ocr]', which brings its models"
            raise UserError(f"reader rapidocr: {error}", expected="the package", do=do) from error
        self._engine = RapidOCR(params={"Global.log_level": "error"})

    @functools.cached_property
    def alphabet(self) -> Collection[str]:
        """The characters of the engine's dictionary."""
        recognizer = self._engine.text_rec or self._engine._load_rec_model()  # 3.10 loads it on first use
        return frozenset(entry for entry in recognizer.postprocess_op.character if len(entry) == 1)  # without "blank"

    def __call__(self, image: np.ndarray) -> str:
        height, width = image.shape[:2]
        scale = LEGIBLE / min(height, width)
        if scale > 1:
            size = round(width * scale), round(height * scale)
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
        return " ".join(self._engine(np.ascontiguousarray(image[..., ::-1])).txts or ())  # expects BGR


READERS = {"world": "blip3o_jax.demo.judges:SignReader", "rapidocr": RapidOcr}
"""Name -> `detection.Reader`: `world` for signs of the demo world, `rapidocr` for photographs."""


@functools.lru_cache(maxsize=2)
def open_reader(name: str) -> Reader:
    """Returns the reader of a name: a key of READERS, or `package.module:attribute`. The result is cached.

    Raises:
      UserError: an unknown name, a missing library, or a reader that does not declare its alphabet.
    """
    reader = registry.make(READERS, name, "reader")
    alphabet = getattr(reader, "alphabet", NotImplemented)
    declared = alphabet is None or isinstance(alphabet, Collection)
    got = "no alphabet" if alphabet is NotImplemented else f"the alphabet {alphabet!r}"
    require(declared, f"reader {name}", got, "its characters, or None for any", "declare it")
    return reader


def check_legible(texts: Sequence[str], reader: Reader, name: str) -> None:
    """Checks that a reader can read texts.

    Raises:
      UserError: a text is too long or has a character that the reader does not know; the message suggests another one.
    """
    known = None if reader.alphabet is None else {normalize(letter) for letter in reader.alphabet}
    longest = getattr(reader, "longest", None)
    shown = "".join(sorted(known or "")).upper()
    for text in texts:
        letters = normalize(text)
        foreign = [letter for letter in letters if known is not None and letter not in known]
        got = f"the character {foreign[0]!r}" if foreign else f"{len(letters)} characters"
        expected = f"at most {longest}"
        if foreign:
            expected = f"some of {shown}" if len(shown) <= 80 else f"some of its {len(shown):,} characters"
        good = not foreign and (longest is None or len(letters) <= longest)
        do = ANOTHER if name == "rapidocr" else RAPIDOCR
        require(good, f"text {text!r}", f"{got}, which the reader {name} cannot read", expected, do)
