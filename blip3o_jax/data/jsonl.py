"""Rows of JSON Lines, a JSON array or a table (CSV, TSV) with the paths of their images: the reference's editing sets,
captioned images, and LLaVA's conversations.

A schema names the fields of a row. Unless the options name it, it is inferred from the first row.

Source: the schemas of the reference's editing branch (which selects them by a substring of the path); the columns of
MagicBrush, InstructPix2Pix, ShareGPT-4o-Image, DiffSynth and the hub's `imagefolder` as published.
Differs from the reference:
1. Relative paths start at the directory of the file, or at `base_dir`.
2. References beyond the fourth are kept; see `max_references`.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from blip3o_jax.config.schema import Natural
from blip3o_jax.data.config import TEXT_KEYS, SourceConfig
from blip3o_jax.data.example import BrokenItem, Example, choose_text
from blip3o_jax.data.files import Skipped, expand
from blip3o_jax.data.rows import SUFFIXES, Rows
from blip3o_jax.errors import UserError, require
from blip3o_jax.text import tasks

IMAGE_MARK = "<image>"
HUMAN, MODEL = ("human", "user"), ("gpt", "assistant")


@dataclasses.dataclass(frozen=True)
class Schema:
    """Fields of a row."""

    text: tuple[str, ...]  # the first that is not blank is used
    target: str
    references: str | None = None  # a path or a list of paths


_INSTRUCTION = Schema(("instruction",), "output_image", "input_images")
_EDIT_TEXT = ("instruction", "edit_prompt", "edit_instruction", "edit")

SCHEMAS = {
    "nano_banana": _INSTRUCTION,
    "x2i2": _INSTRUCTION,  # inpaint, video_edit, video_icedit, video_icgen
    "x2i2_reflect": Schema(("used_instruction", "instruction"), "image", "input_images"),
    "sharegpt4o": Schema(("input_prompt", *_EDIT_TEXT), "output_image", "input_image"),
    "sharegpt4o_t2i": Schema(("input_prompt",), "output_image"),
    "unified": Schema(("txt",), "image_path", "input_images_paths"),  # to which the reference converts all others
    "magicbrush": Schema(_EDIT_TEXT, "target_img", "source_img"),
    "instructpix2pix": Schema(_EDIT_TEXT, "edited_image", "input_image"),
    "instructpix2pix_original": Schema(_EDIT_TEXT, "edited_image", "original_image"),
    "diffsynth_edit": Schema(TEXT_KEYS, "image", "edit_image"),
    "samples": Schema(("prompt",), "file", "image"),  # samples.jsonl of sample.py
    "image_path": Schema(TEXT_KEYS, "image_path"),
    "image": Schema(TEXT_KEYS, "image"),
    "file_name": Schema(TEXT_KEYS, "file_name"),
    "llava": Schema(("conversations",), "image"),  # see _from_conversation
}
"""Name -> schema; the first that fits a row is inferred."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the kind `jsonl`."""

    schema: str = ""  # a key of SCHEMAS; default: inferred from the first row
    base_dir: str = ""  # base of relative paths; default: the directory of the file
    text_key: str = ""  # key of the caption or instruction; default: that of the schema
    max_references: Natural = 0  # most references of a row, the first ones; 0: all


class Jsonl:
    """The rows of one or several files with one schema."""

    def __init__(self, source: SourceConfig, paths: Sequence[str] = (), skipped: Skipped | None = None):
        """`paths` are the files; default: those of `source.path`. `skipped` counts skipped files."""
        self.skipped = Skipped() if skipped is None else skipped
        self._task = tasks.find(source.task)
        self._named_task = source.task
        self._options = source.read_options(Options)
        paths = paths or _files(source.path, self.skipped)
        self._rows = Rows(paths)
        require(len(self._rows) > 0, source.path, "no rows", "at least one", "fill it or leave it out")
        self._schema = self._find_schema(paths[0])
        good = not self._task.needs_references or self._schema.references or self._schema == SCHEMAS["llava"]
        what = f"{source.path}: rows without reference images"
        require(good, what, None, f"some for task {source.task}", "use task t2i")
        self._numbers = self._own_samples() if self._schema == SCHEMAS["samples"] else range(len(self._rows))
        got = f"none of task {source.task}{self.skipped.in_brackets()}"
        require(len(self._numbers) > 0, f"{source.path}: rows", got, "at least one", "choose another task")

    def __len__(self) -> int:
        return len(self._numbers)

    def _own_samples(self) -> list[int]:
        """Returns the rows of this task, of those of all tasks that sample.py writes into one file.

        A reconstruction is a sheet of panels. Any other image can be reconstructed.
        """
        numbers = []
        for number in range(len(self._rows)):
            try:
                _, name, row = self._rows[number]
            except BrokenItem:  # reported when it is read
                numbers.append(number)
                continue
            task = row.get("task") or self._named_task
            if task != "reconstruct" and (task == self._named_task or self._task.target_is_reference):
                numbers.append(number)
            else:
                self.skipped.add(f"samples of task {task}", name)
        return numbers

    def __getitem__(self, index: int) -> Example:
        path, name, row = self._rows[self._numbers[index]]
        fields, schema = row, self._schema
        if schema == SCHEMAS["llava"]:
            fields, schema = _from_conversation(row, name)
        text, origin = choose_text(fields, schema.text, self._options.text_key, name)
        target = self._paths_of(fields, schema.target, path, name)
        if len(target) != 1:
            raise BrokenItem(name, f"{schema.target} holds {len(target)} images, not 1")
        references = ()
        if self._task.needs_references:
            references = self._paths_of(fields, schema.references, path, name)
            references = references[: self._options.max_references or None]
        used = {*origin.looked_for, schema.target, schema.references}
        metadata = {key: value for key, value in row.items() if key not in used}
        return Example(self._named_task, text, target[0], references, name, metadata, origin=origin)

    def _paths_of(self, row: dict, field: str, path: str, name: str) -> tuple[str, ...]:
        value = row.get(field)
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not values or not all(isinstance(v, str) and v for v in values):
            there = ", ".join(row) or "none"
            raise BrokenItem(name, f"{field} is {value!r:.60}, not the path of an image; the row has {there}")
        base = self._options.base_dir or os.path.dirname(path)
        paths = tuple(os.path.join(base, value) for value in values)
        if self._schema == SCHEMAS["samples"] and field == self._schema.references:  # named on a command line
            paths = tuple(value if os.path.exists(value) else near for value, near in zip(values, paths, strict=True))
        return paths

    def _find_schema(self, path: str) -> Schema:
        named = self._options.schema
        if named:
            require(named in SCHEMAS, f"{path}: schema", repr(named), f"one of {', '.join(SCHEMAS)}", "choose one")
            return SCHEMAS[named]
        try:
            _, name, row = self._rows[0]
        except BrokenItem as error:
            expected = "one JSON object per line, an array of objects, or a table"
            raise UserError(f"{error.name}: {error.reason}", expected=expected, do="fix it") from None
        asked = self._options.text_key
        fitting = [each for each in SCHEMAS.values() if {each.target, each.references} - {None} <= row.keys()]
        what = f"{name}: fields {', '.join(sorted(row)) or 'none'}"
        expected = f"those of a schema: {', '.join(SCHEMAS)}"
        require(bool(fitting), what, None, expected, "rename them, or give options.schema and options.text_key")
        captioned = [each for each in fitting if set((asked,) if asked else each.text) & row.keys()]
        return (captioned or fitting)[0]  # images without captions are for stages without text


def _files(path: str, skipped: Skipped) -> list[str]:
    """Lists the files of a path; of a directory only its JSON Lines, else its JSON arrays, else its tables."""
    if not os.path.isdir(path):
        return expand(path, SUFFIXES, skipped)
    for suffixes in (SUFFIXES[:2], SUFFIXES[2:3]):
        passed = Skipped()
        try:
            files = expand(path, suffixes, passed)
        except UserError:
            continue
        skipped.update(passed)
        return files
    return expand(path, SUFFIXES[3:], skipped)


def _from_conversation(row: dict[str, Any], name: str) -> tuple[dict[str, Any], Schema]:
    """Converts a row of LLaVA's schema to fields `text`, `target` and `references`; returns them with their schema.

    The row has one question and one answer, with `<image>` for the images in order. If the answer contains an image,
    the question is the caption or instruction; else the answer is the caption.

    Raises:
      BrokenItem: more than one exchange, or the numbers of images and of `<image>` differ.
    """
    turns = row.get("conversations")
    turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    turns = [turn for turn in turns if isinstance(turn.get("value"), str) and turn.get("from") != "system"]
    if len(turns) != 2 or turns[0].get("from") not in HUMAN or turns[1].get("from") not in MODEL:
        raise BrokenItem(name, f"conversations of {len(turns)} turns, not of one question and its answer: no caption")
    images = row.get("image")
    images = [images] if isinstance(images, str) else images if isinstance(images, list) else []
    asked, answered = (turn["value"] for turn in turns)
    generated = answered.count(IMAGE_MARK)
    given = asked.count(IMAGE_MARK) or len(images) - generated  # the mark is optional
    if given + generated != len(images):
        raise BrokenItem(name, f"{len(images)} images for {given + generated} marks {IMAGE_MARK}")
    text = asked if generated else answered
    fields = {key: value for key, value in row.items() if key not in ("conversations", "image")}
    fields |= {"text": text.replace(IMAGE_MARK, "").strip(), "conversations": turns}
    fields |= {"target": images[given:] if generated else images, "references": images[:given] if generated else []}
    return fields, Schema(("text",), "target", "references")
