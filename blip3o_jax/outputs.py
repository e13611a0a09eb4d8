"""Pictures and what they were made with, on disk: PNGs, `samples.jsonl`, `grid.png`."""

import contextlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from blip3o_jax.data import images
from blip3o_jax.errors import UserError
from blip3o_jax.files import unwritable, writable

RECORDS, GRID = "samples.jsonl", "grid.png"


class Outputs:
    """Where pictures go: numbered files in a directory, or one named file.

    A context: directories that were made for it go away again if nothing was written.

    Attributes:
      files: what was written, in order.
    """

    def __init__(self, directory: pathlib.Path, file: pathlib.Path | None = None):
        """
        Raises:
          UserError: the directory cannot be made or written, or the file is no PNG.
        """
        if file is not None and (file.suffix.lower() != ".png" or file.is_dir()):
            raise UserError("output", got=file, expected="a file name that ends in .png", do="change it")
        self._directory = directory if file is None else file.parent
        self._file = file
        self.files: list[pathlib.Path] = []
        with contextlib.ExitStack() as place:
            place.enter_context(writable(self._directory))
            numbers = [int(path.stem) for path in self._directory.glob("*.png") if path.stem.isdecimal()]
            self._place = place.pop_all()
        self._next = max(numbers, default=-1) + 1

    def __enter__(self) -> "Outputs":
        return self

    def __exit__(self, *_: object) -> None:
        self._place.close()

    def add(self, picture: Image.Image, record: Mapping[str, Any]) -> pathlib.Path:
        """Writes one picture with its record, and appends the record to `samples.jsonl`."""
        path = self._file or self._directory / f"{self._next + len(self.files):05d}.png"
        try:
            if not self.files and self._file is None:
                (self._directory / GRID).unlink(missing_ok=True)  # it shows the pictures of an earlier run
            images.save_png(picture, path, metadata(record))
            self.files.append(path)
            if self._file is None:
                with open(self._directory / RECORDS, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"file": path.name, **record}) + "\n")
        except OSError as error:
            raise unwritable(path, error) from error
        return path

    def add_grid(self, pictures: Sequence[Image.Image], columns: int) -> pathlib.Path:
        """Writes all pictures of a run on one sheet."""
        path = self._directory / GRID
        try:
            images.save_png(images.grid([np.asarray(picture) for picture in pictures], columns), path)
        except OSError as error:
            raise unwritable(path, error) from error
        return path


def metadata(record: Mapping[str, Any]) -> dict[str, str]:
    """PNG text entries: `parameters`, as the common web interfaces write it, and `blip3o`, all of it as JSON.

    Args:
      record: of a picture, as it stands in `samples.jsonl`.
    """
    lines = [record["prompt"]]
    if record["negative_prompt"]:
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    fields = {
        "Steps": record["num_inference_steps"],
        "Sampler": record["sampler"],
        "CFG scale": record["guidance_scale"],
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model hash": record["checkpoint_id"],
        "Model": _quoted(record["checkpoint"].rstrip("/").rpartition("/")[2]),
        "Version": f"blip3o_jax {record['version']}",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in fields.items()))
    return {"parameters": "\n".join(lines), "blip3o": json.dumps(dict(record))}


def _quoted(text: str) -> str:
    """A value that may hold separators, as those interfaces write it."""
    return json.dumps(text, ensure_ascii=False) if any(character in text for character in ",:\n") else text
