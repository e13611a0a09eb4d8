"""Writes images with their settings: PNGs, `samples.jsonl`, `grid.png`.

Processes can share a directory: every file name is claimed exclusively, files are never replaced, and `samples.jsonl`
lists existing images only, one atomic line per image.
"""

import contextlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from blip3o_jax.data import images
from blip3o_jax.errors import UserError
from blip3o_jax.files import append_line, output_file, unwritable, writable

RECORDS, GRID = "samples.jsonl", "grid.png"
MAX_DIGITS = 9  # files with longer numbers are ignored


class Outputs:
    """A destination of images: numbered files in a directory, or one named file.

    A context manager: on exit, directories that it created are removed if nothing was written.
    """

    def __init__(self, directory: str | os.PathLike, file: str | os.PathLike | None = None):
        """Claims the destination.

        Args:
          directory: directory of numbered images, `samples.jsonl` and `grid.png`.
          file: path of a single image instead. An existing file is replaced, unless another process changes it after
            this call.

        Raises:
          UserError: the destination is not writable, or one of its files is not regular.
        """
        self._file = None if file is None else output_file(file, suffixes=(".png",))
        self._directory = pathlib.Path(directory) if self._file is None else self._file.parent
        if self._file is None and not str(directory).strip():
            raise UserError("output_dir", got="an empty name", expected="a directory", do="name one")
        with contextlib.ExitStack() as place:
            place.enter_context(writable(self._directory))
            if self._file is None:
                for name in (RECORDS, GRID):
                    output_file(self._directory / name)
                numbers = [int(path.stem) for path in self._directory.glob("*.png") if _is_number(path.stem)]
                self._numbers = itertools.count(max(numbers, default=-1) + 1)
            else:
                self._before = _state(self._file)
                with _claimed(self._file) as part:
                    images.save_png(np.zeros((1, 1, 3), np.uint8), part)  # reports a too long name now
            self._place = place.pop_all()

    def __enter__(self) -> "Outputs":
        return self

    def __exit__(self, *_: object) -> None:
        self._place.close()

    def add(self, image: Image.Image, record: Mapping[str, Any]) -> pathlib.Path:
        """Writes one image with its record, and appends the record to `samples.jsonl`.

        Raises:
          UserError: writing fails, or another process has written the named file.
        """
        if self._file is not None:
            return self._replace(image, metadata(record))
        numbered = (self._directory / f"{number:05d}.png" for number in self._numbers)
        path = self._save(image, numbered, metadata(record))
        append_line(self._directory / RECORDS, json.dumps({"file": path.name, **record}))
        return path

    def add_grid(self, shown: Sequence[Image.Image], columns: int) -> pathlib.Path:
        """Writes images on one sheet: grid.png, or the first free name of grid-1.png, grid-2.png and so on."""
        names = (f"grid-{number}.png" if number else GRID for number in range(10**MAX_DIGITS))
        sheet = images.grid([np.asarray(image) for image in shown], columns)
        return self._save(Image.fromarray(sheet), (self._directory / name for name in names), {})

    def _save(self, image: Image.Image, paths: Iterable[pathlib.Path], entries: Mapping[str, str]) -> pathlib.Path:
        """Writes to the first free path."""
        for path in paths:
            with _claimed(path) as part:
                if part is not None and not os.path.lexists(path):
                    images.save_png(image, part, entries)
                    os.rename(part, path)
                    return path
        raise UserError(
            "output", got=f"no free name in {self._directory}", expected="a free number", do="choose another directory"
        )

    def _replace(self, image: Image.Image, entries: Mapping[str, str]) -> pathlib.Path:
        with _claimed(self._file) as part:
            if part is None or _state(self._file) != self._before:
                raise UserError(
                    "output",
                    got=f"{self._file}, which another process has written meanwhile",
                    expected="a file of this run only",
                    do="choose another name",
                )
            images.save_png(image, part, entries)
            os.replace(part, self._file)
            self._before = _state(self._file)
            return self._file


@contextlib.contextmanager
def _claimed(path: pathlib.Path) -> Iterator[pathlib.Path | None]:
    """Yields a temporary file beside `path`, claimed exclusively, to be renamed; None if another process claimed it."""
    part = path.with_name(f".{path.name}.part")
    try:
        try:
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            yield None
            return
        try:
            yield part
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


def _state(path: pathlib.Path) -> tuple[int, ...] | None:
    """Returns file attributes that change on writing; None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _is_number(stem: str) -> bool:
    return stem.isdecimal() and len(stem) <= MAX_DIGITS


def metadata(record: Mapping[str, Any]) -> dict[str, str]:
    """Returns the text entries of a PNG: `parameters` as in common web interfaces, and `blip3o`, the record as JSON."""
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
    """Quotes a value that contains separators, as those interfaces do."""
    return json.dumps(text, ensure_ascii=False) if any(character in text for character in ",:\n") else text
