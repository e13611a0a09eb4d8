"""Files of prompts: read whole, and as a data set of prompts without target pictures.

Such a set is what reinforcement learning draws its prompts from; it has nothing to train on otherwise.
"""

import csv
import dataclasses
import io
import json
import os
import pathlib

from blip3o_jax.config import registry, schema
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.example import Example
from blip3o_jax.errors import UserError
from blip3o_jax.files import read_text
from blip3o_jax.text.tasks import TASKS


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the kind `prompts`: none."""


class PromptFile:
    """The prompts of a file, with everything its lines say as metadata; images are found from the file's directory."""

    def __init__(self, source: SourceConfig):
        schema.from_dict(Options, source.options, f"options of {source.path}")
        self._path, self._task = pathlib.Path(source.path), source.task
        self._entries = read_prompts(self._path)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Example:
        entry = self._entries[index]
        listed = entry.get("image") or ()
        listed = (listed,) if isinstance(listed, str) else tuple(listed)
        references = tuple(os.path.join(self._path.parent, image) for image in listed)
        task = entry.get("task") or self._task
        return Example(task, entry["prompt"], None, references, f"{self._path}:{index + 1}", entry)


def read_prompts(path: pathlib.Path) -> list[dict]:
    """Entries with `prompt`, and where the file has them `image` (path or list) and `task`; other columns are left.

    Formats: .txt, one prompt a line; .jsonl, one object a line; .csv with a header.

    Raises:
      UserError: another format, an unreadable file, a line without a prompt, or an image or task that is none.
    """
    text = read_text(path, "prompts_file")
    lines = [line for line in text.split("\n") if line.strip()]
    if path.suffix == ".txt":
        entries = [{"prompt": line.strip()} for line in lines]
    elif path.suffix == ".jsonl":
        entries = [_json(line, f"entry {number} of {path}") for number, line in enumerate(lines, 1)]
    elif path.suffix == ".csv":
        entries = _table(text, path)
    else:
        raise UserError("prompts_file", got=path, expected=".txt, .jsonl or .csv", do="convert it")
    for number, entry in enumerate(entries, 1):
        _check_entry(entry, f"entry {number} of {path}")
    return entries


def _json(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"prompts_file: {where}: {error}", expected="one JSON object a line", do="mend it") from error


def _table(text: str, path: pathlib.Path) -> list[dict]:
    try:
        return list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise UserError(
            "prompts_file", got=f"{path} ({error})", expected="a table with a header", do="correct it"
        ) from error


def _check_entry(entry: object, where: str) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise UserError(f"prompts_file: {where} has no prompt", expected="one in each", do="add it")
    image, task = entry.get("image") or (), entry.get("task") or "t2i"
    if not isinstance(image, str) and not (isinstance(image, (list, tuple)) and all(isinstance(x, str) for x in image)):
        raise UserError(
            f"prompts_file: {where} has image {image!r}", expected="a path or a list of paths", do="correct it"
        )
    if not isinstance(task, str):
        raise UserError(f"prompts_file: {where} has task {task!r}", expected="a name", do="correct it")
    registry.check_name(TASKS, task, f"prompts_file: {where}: task")
