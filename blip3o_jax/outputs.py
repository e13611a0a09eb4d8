"""Pictures and what they were made with, on disk: PNGs, `samples.jsonl`, `grid.png`."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from blip3o_jax.data import images
from blip3o_jax.errors import UserError
from blip3o_jax.version import __version__

RECORDS = "samples.jsonl"


class Outputs:
    """Where pictures go: numbered files in a directory, or one named file.

    Attributes:
      files: what was written, in order.
    """

    def __init__(self, directory: pathlib.Path, file: pathlib.Path | None = None):
        """
        Raises:
          UserError: the directory cannot be made or written.
        """
        self._directory = directory if file is None else file.parent
        self._file = file
        self.files: list[pathlib.Path] = []
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self._directory, error.strerror) from error
        if not os.access(self._directory, os.W_OK | os.X_OK):
            raise _unwritable(self._directory, "no permission")
        taken = [int(path.stem) for path in self._directory.glob("*.png") if path.stem.isdigit()]
        self._next = max(taken, default=-1) + 1

    def add(self, picture: Image.Image, record: Mapping[str, Any]) -> pathlib.Path:
        """Writes one picture with its record, and appends the record to `samples.jsonl`."""
        path = self._file or self._directory / f"{self._next + len(self.files):05d}.png"
        try:
            images.save_png(picture, path, metadata(record))
            if self._file is None:
                with open(self._directory / RECORDS, "a") as file:
                    file.write(json.dumps({"file": path.name, **record}) + "\n")
        except OSError as error:
            raise _unwritable(path, error.strerror) from error
        self.files.append(path)
        return path

    def add_grid(self, pictures: Sequence[Image.Image], columns: int) -> pathlib.Path:
        """Writes all pictures of a run on one sheet."""
        path = self._directory / "grid.png"
        images.save_png(images.grid([np.asarray(picture) for picture in pictures], columns), path)
        return path


def metadata(record: Mapping[str, Any]) -> dict[str, str]:
    """PNG text entries: `parameters`, as the common web interfaces write it, and `blip3o`, all of it as JSON."""
    width, height = record["width"], record["height"]
    lines = [record["prompt"]]
    if record.get("negative_prompt"):
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    lines.append(
        f"Steps: {record['num_inference_steps']}, Sampler: {record['sampler']}, "
        f"CFG scale: {record['guidance_scale']}, Seed: {record['seed']}, Size: {width}x{height}, "
        f"Model: {record['checkpoint_id']}, Version: blip3o_jax {__version__}"
    )
    return {"parameters": "\n".join(lines), "blip3o": json.dumps({**record, "version": __version__})}


def _unwritable(path: pathlib.Path, reason: str | None) -> UserError:
    return UserError(f"output: got {path} - expected a place that can be written ({reason}) - choose another one")
