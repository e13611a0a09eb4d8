"""A directory of pictures: each with a `.txt` of the same name, or all described in `metadata.jsonl`.

Source: the `imagefolder` convention (`file_name` and a caption per line of metadata.jsonl).
"""

import dataclasses
import os

from blip3o_jax.config import schema
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.example import BrokenItem, Example, as_text
from blip3o_jax.data.jsonl import Jsonl
from blip3o_jax.errors import UserError
from blip3o_jax.text import tasks

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the kind `folder` without a metadata.jsonl; with one, those of `jsonl`."""


class Folder:
    """The pictures below a directory, sorted by path."""

    def __init__(self, source: SourceConfig):
        schema.from_dict(Options, source.options, f"options of {source.path}")
        if tasks.find(source.task).needs_references:
            raise UserError(
                f"{source.path}: folder with task {source.task}", expected="t2i or reconstruct", do="use jsonl instead"
            )
        self._task = source.task
        self._root = source.path
        self._names = sorted(
            os.path.relpath(os.path.join(directory, file), source.path)
            for directory, _, files in os.walk(source.path)
            for file in files
            if file.lower().endswith(SUFFIXES)
        )
        if not self._names:
            raise UserError(
                f"{source.path}: no pictures", expected=f"{' '.join(SUFFIXES)} files below it", do="fix the path"
            )

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        name = self._names[index]
        path = os.path.join(self._root, name)
        try:
            with open(f"{os.path.splitext(path)[0]}.txt", "rb") as file:
                text = as_text(file.read(), name).strip()
        except FileNotFoundError:
            text = None
        except OSError as error:
            raise BrokenItem(name, f"caption cannot be read: {error.strerror}") from None
        return Example(self._task, text, path, (), name)


def open_folder(source: SourceConfig) -> Folder | Jsonl:
    """Reads a directory by its metadata.jsonl where there is one."""
    if not os.path.isdir(source.path):
        raise UserError(f"{source.path}: not a directory", expected="a folder of pictures", do="fix the path")
    metadata = os.path.join(source.path, "metadata.jsonl")
    if os.path.isfile(metadata):
        return Jsonl(dataclasses.replace(source, path=metadata))
    return Folder(source)
