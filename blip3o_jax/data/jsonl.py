"""Random access to JSONL data sets whose images are files: the editing sets of the reference, and captioned images.

A schema names the fields of a row. It is told by the fields of the first row where the options do not name it.

Source: the schemas that the reference's editing branch reads (it chooses them by a substring of the path).
Differs from the reference: 1. relative paths start at the file's directory, or at `base_dir`; 2. references beyond the
fourth are not dropped, unless `max_references` says so.
"""

import dataclasses
import json
import os

import numpy as np

from blip3o_jax.config import schema
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.example import BrokenItem, Example, as_text
from blip3o_jax.data.files import OffsetReader, expand
from blip3o_jax.errors import UserError
from blip3o_jax.text import tasks

_BLOCK = 1 << 24


@dataclasses.dataclass(frozen=True)
class Schema:
    """Fields of a row."""

    text: tuple[str, ...]  # the first of these that a row has
    target: str
    references: str | None = None  # a path or a list of paths


_INSTRUCTION = Schema(("instruction",), "output_image", "input_images")

SCHEMAS = {
    "nano_banana": _INSTRUCTION,
    "x2i2": _INSTRUCTION,  # inpaint, video_edit, video_icedit, video_icgen
    "x2i2_reflect": Schema(("used_instruction", "instruction"), "image", "input_images"),
    "sharegpt4o": Schema(("input_prompt",), "output_image", "input_image"),
    "sharegpt4o_t2i": Schema(("input_prompt",), "output_image"),
    "unified": Schema(("txt",), "image_path", "input_images_paths"),  # what the reference renames all others to
    "image_path": Schema(("caption", "text", "txt", "prompt"), "image_path"),
    "image": Schema(("caption", "text", "txt", "prompt"), "image"),
    "file_name": Schema(("caption", "text", "txt", "prompt"), "file_name"),
}
"""Name -> schema; where it has to be told from a row, the first that fits."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the kind `jsonl`."""

    schema: str = ""  # a key of SCHEMAS; default: told from the first row
    base_dir: str = ""  # of relative paths; default: the directory of the file
    text_key: str = ""  # of the caption or instruction, instead of the schema's
    max_references: int = 0  # keep the first so many of a row; 0 keeps all


class Jsonl:
    """The rows of one or several files, which share a schema."""

    def __init__(self, source: SourceConfig):
        self._task = source.task
        self._options = schema.from_dict(Options, source.options, f"options of {source.path}")
        self._paths = expand(source.path, ".jsonl")
        spans = [line_spans(path) for path in self._paths]
        self._file_of = np.repeat(np.arange(len(spans)), [len(span) for span in spans])
        self._spans = np.concatenate(spans)
        self._reader = OffsetReader()
        if not len(self._spans):
            raise UserError(
                f"{source.path}: no rows", expected="one JSON object per line", do="fill it or leave it out"
            )
        self._schema = self._find_schema()
        if tasks.find(self._task).needs_references and not self._schema.references:
            raise UserError(
                f"{source.path}: rows without reference images", expected="some for task edit", do="use task t2i"
            )

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Example:
        path, name, row = self._row(index)
        text = next((row[key] for key in self._text_keys() if row.get(key)), None)
        text = None if text is None else as_text(text, name)
        target = self._paths_of(row, self._schema.target, path, name)
        references = ()
        if tasks.find(self._task).needs_references and self._schema.references:
            references = self._paths_of(row, self._schema.references, path, name)
            references = references[: self._options.max_references or None]
        if len(target) != 1:
            raise BrokenItem(name, f"{self._schema.target} holds {len(target)} images, not 1")
        used = {*self._text_keys(), self._schema.target, self._schema.references}
        metadata = {key: value for key, value in row.items() if key not in used}
        return Example(self._task, text, target[0], references, name, metadata)

    def _text_keys(self) -> tuple[str, ...]:
        return (self._options.text_key,) if self._options.text_key else self._schema.text

    def _row(self, index: int) -> tuple[str, str, dict]:
        """Path of the file, name of the item, content of the line."""
        path = self._paths[self._file_of[index]]
        offset, size, line = (int(number) for number in self._spans[index])
        name = f"{os.path.basename(path)}:{line}"
        try:
            row = json.loads(self._reader.read(path, offset, size))
        except (OSError, ValueError, RecursionError) as error:
            raise BrokenItem(name, f"line cannot be read as JSON: {error}") from None
        if not isinstance(row, dict):
            raise BrokenItem(name, "line is not a JSON object")
        return path, name, row

    def _paths_of(self, row: dict, field: str, path: str, name: str) -> tuple[str, ...]:
        value = row.get(field)
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not values or not all(isinstance(v, str) and v for v in values):
            raise BrokenItem(name, f"{field} is {value!r:.60}, not the path of an image")
        base = self._options.base_dir or os.path.dirname(path)
        return tuple(os.path.join(base, value) for value in values)

    def _find_schema(self) -> Schema:
        named = self._options.schema
        if named:
            if named not in SCHEMAS:
                known = ", ".join(sorted(SCHEMAS))
                raise UserError(f"{self._paths[0]}: schema {named!r}", expected=f"one of {known}", do="choose one")
            return SCHEMAS[named]
        try:
            _, name, row = self._row(0)
        except BrokenItem as error:
            raise UserError(
                f"{error.name}: {error.reason}", expected="a JSON object in every line", do="fix it"
            ) from None
        fitting = [
            each
            for each in SCHEMAS.values()
            if {each.target, *([each.references] if each.references else [])} <= set(row)
        ]
        for each in fitting:
            keys = (self._options.text_key,) if self._options.text_key else each.text
            if set(keys) & set(row):
                return each
        if fitting:  # pictures without captions, for the stages that read none
            return fitting[0]
        raise UserError(
            f"{name}: fields {', '.join(sorted(row)) or 'none'}",
            expected=f"those of a schema: {', '.join(SCHEMAS)}",
            do="rename them, or give options.schema and options.text_key",
        )


def line_spans(path: str) -> np.ndarray:
    """Where the lines of a file stand that are not blank: i64[lines 3], byte offset, bytes, number from 1."""
    starts = [np.zeros(1, np.int64)]
    size = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            starts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10).astype(np.int64) + size + 1)
            size += len(block)
    starts = np.concatenate(starts)
    ends = np.append(starts[1:], size)
    spans = np.stack([starts, ends - starts, np.arange(1, len(starts) + 1)], axis=1)
    return spans[spans[:, 1] > 1]
