"""Reads prompt files, also as a data set of prompts without target images.

| file | prompts |
|---|---|
| .txt | one a line; blank lines and comments (`#` alone, or `# ` and text) are skipped |
| .jsonl | one JSON object a line, such as sample.py's samples.jsonl and GenEval's evaluation_metadata.jsonl |
| .json | an array of objects, or an object of objects by name (ImgEdit, whose `id` names the image) |
| .csv | a table with a header, separated by commas, semicolons or tabs (DrawBench: column `Prompts`) |
| .tsv | a table with a header, separated by tabs, without quoting (PartiPrompts) |
| .png | one, from the metadata of an image that sample.py wrote |
| a directory | one in each .txt file (DPG-Bench) |

A table with one column has no separator: commas are part of its prompts. In others a row with too many cells is an
error.
"""

import csv
import dataclasses
import io
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from blip3o_jax.config import registry
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.example import Example
from blip3o_jax.errors import UserError, require
from blip3o_jax.files import parse_json, read_bytes, read_json, read_text
from blip3o_jax.text.tasks import TASKS, find

PROMPT_NAMES = ("prompt", "prompts", "caption", "text", "instruction")
"""Columns of prompts; the first that exists is used."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
RECORD_KEYS = {"checkpoint_id", "prompt", "index"}  # in the metadata of images written by sample.py
METADATA = "blip3o"  # PNG text entry of the metadata

Rows = Iterator[tuple[str, dict[str, Any]]]
"""Position of a row, for messages, and its values."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of a prompt file."""

    place: str  # file and line
    prompt: str
    images: tuple[str, ...]
    task: str | None
    values: dict[str, Any]  # all values of the row, including `prompt`, `image` and `task`; empty: no row of a file

    @property
    def where(self) -> str:
        """File and line, for messages; the flag of an entry of the command line."""
        return f"prompts_file: {self.place}" if self.values else self.place

    @property
    def is_record(self) -> bool:
        """Whether the row is the metadata of an image written by sample.py."""
        return self.values.keys() >= RECORD_KEYS and isinstance(self.values["checkpoint_id"], str)

    def named(self, field: str) -> str:
        """Returns the name of a value for messages, with file and line; alone if it is from the command line."""
        return f"{self.where}: {field}" if self.values else field

    def check(self, task: str, images: Sequence[str]) -> None:
        """Raises UserError for a missing text that the task needs, or images that it does not take."""
        good, do = bool(self.prompt.strip()) or not find(task).needs_text, "describe the image"
        require(good, self.named("prompt"), "an empty one", "a caption or an instruction", do)
        fits, got = not images or find(task).has_references, f"{', '.join(images)} for task {task}"
        require(fits, self.named("image"), got, "none", "leave it out or choose task edit")


class PromptFile:
    """The prompts of a file, with all values of a row as metadata; image paths are relative to the file.

    Those of an image that sample.py wrote may also be relative to the working directory, as it records them. As in
    sample.py, a row with an image and without a task is an edit, unless the source has another task than t2i.
    """

    def __init__(self, source: SourceConfig):
        require(not source.options, f"options of {source.path}", ", ".join(source.options), "none", "leave them out")
        self._path, self._task = pathlib.Path(source.path).expanduser(), source.task
        self._entries = read_prompts(self._path)
        for entry in self._entries:
            if entry.task is not None:
                registry.check_trusted(TASKS, entry.task, source.task, "task", entry.where)
            entry.check(self._task_of(entry), entry.images)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Example:
        entry = self._entries[index]
        references = tuple(os.path.join(self._path.parent, image) for image in entry.images)
        metadata = entry.values
        if entry.is_record:  # its images are named as on the command line, its own columns are below `metadata`
            references = tuple(x if os.path.exists(x) else near for x, near in zip(entry.images, references))
            own = metadata.get("metadata")
            metadata = metadata | (own if isinstance(own, dict) else {})
        return Example(self._task_of(entry), entry.prompt, None, references, entry.place, metadata)

    def _task_of(self, entry: Entry) -> str:
        return entry.task or ("edit" if entry.images and self._task == "t2i" else self._task)


def read_prompts(path: str | os.PathLike, columns: Sequence[str] = ()) -> list[Entry]:
    """Reads a prompt file; reports skipped lines on stderr.

    Args:
      path: file or directory as in the table above.
      columns: further column names to match case-insensitively.

    Raises:
      UserError: another format, an unreadable file, no prompts, or a row without a prompt, with too many cells, or with
        an invalid image or task.
    """
    path = pathlib.Path(os.path.expanduser(path))
    reader = _directory if path.is_dir() else READERS.get(path.suffix.lower())
    require(reader is not None, "prompts_file", path, f"{', '.join(READERS)} or a directory", "convert it")
    entries = [_entry(place, values, columns) for place, values in reader(path)]
    require(bool(entries), "prompts_file", f"no prompts in {path}", "at least one", "add one")
    return entries


def _text(path: pathlib.Path) -> Rows:
    comments = 0
    for number, line in _lines(path):
        comments += (comment := line == "#" or line.startswith("# "))
        if not comment:
            yield f"{path}:{number}", {"prompt": line}
    if comments:
        _say(f"{path}: {comments} comments skipped")


def _lines(path: pathlib.Path) -> list[tuple[int, str]]:
    """Returns the numbers and contents of lines that are not blank, stripped."""
    text = read_text(path, "prompts_file").replace("\r\n", "\n").replace("\r", "\n")
    return [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _directory(path: pathlib.Path) -> Rows:
    files = sorted(other for other in path.iterdir() if not other.name.startswith("."))
    texts = [file for file in files if file.suffix.lower() == ".txt"]
    texts.sort(key=lambda file: (len(file.stem) if file.stem.isdecimal() else 0, file.stem))
    for file in texts:
        lines = _lines(file)
        require(len(lines) == 1, f"prompts_file: {file}", f"{len(lines)} lines", "one prompt in each file", "split it")
        yield str(file), {"prompt": lines[0][1], "file_name": file.name}
    if len(texts) < len(files):
        _say(f"{path}: {len(files) - len(texts)} other than .txt skipped")


def _json_lines(path: pathlib.Path) -> Rows:
    rows, torn = [], []
    for number, line in _lines(path):
        try:
            rows.append((f"{path}:{number}", parse_json(line, f"prompts_file: {path}:{number}")))
        except UserError as error:
            torn.append(error)
    if torn and not any(values.keys() >= RECORD_KEYS for _, values in rows):
        raise torn[0]
    if torn:
        _say(f"{path}: {len(torn)} lines skipped that a killed process left unfinished")
    yield from rows


def _json(path: pathlib.Path) -> Rows:
    whole = read_json(path, "prompts_file", object)
    if isinstance(whole, list):
        rows = [{"prompt": values} if isinstance(values, str) else values for values in whole]
    elif not isinstance(whole, dict) or isinstance(whole.get("prompt"), str):
        rows = [whole]
    else:
        rows = [{"name": name, **values} if isinstance(values, dict) else values for name, values in whole.items()]
    for number, values in enumerate(rows, 1):
        yield f"entry {number} of {path}", values


def _table(path: pathlib.Path) -> Rows:
    text = read_text(path, "prompts_file")
    if path.suffix.lower() == ".tsv":
        delimiter, rules = "\t", {"quoting": csv.QUOTE_NONE}
    else:
        delimiter, rules = max(",;\t", key=text.lstrip().partition("\n")[0].count), {"strict": True}
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, **rules)
    names: list[str] = []
    try:
        for cells in reader:
            if len(names) == 1:
                cells = [delimiter.join(cells)]
            where, cells = f"{path}:{reader.line_num}", [cell.strip() for cell in cells]
            what, do = f"prompts_file: {where}", "put text that holds the separator in quotation marks"
            if not any(cells):
                continue
            if not names:
                names = cells
                for name in filter(None, names):
                    require(names.count(name) == 1, what, f"two columns {name}", "unique names", "rename one")
                continue
            got = f"{len(cells)} cells for {len(names)} columns"
            require(len(cells) <= len(names), what, got, "a cell per column", do)
            yield where, {name: cell for name, cell in zip(names, cells, strict=False) if name and cell}
    except csv.Error as error:
        got, do = f"{path}:{reader.line_num} ({error})", "correct the line and its quotation marks"
        raise UserError("prompts_file", got=got, expected="a table with a header", do=do) from error


def _png(path: pathlib.Path) -> Rows:
    content = read_bytes(path, "prompts_file")
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            entry = image.text.get(METADATA)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        got, expected = f"{path} ({error})", "a PNG of sample.py"
        raise UserError("prompts_file", got=got, expected=expected, do="check it") from error
    require(entry is not None, "prompts_file", f"{path} without metadata", "a PNG of sample.py", "check it")
    yield str(path), parse_json(entry, f"prompts_file: metadata of {path}")


READERS = {".txt": _text, ".jsonl": _json_lines, ".json": _json, ".csv": _table, ".tsv": _table, ".png": _png}


def _entry(place: str, values: object, columns: Sequence[str]) -> Entry:
    where = f"prompts_file: {place}"
    require(isinstance(values, dict), where, type(values).__name__, "an object with a prompt", "correct it")
    values = _renamed(values, ("prompt", "image", "task", *columns), where)
    prompt = values.get("prompt")
    got = f"no prompt, but {', '.join(map(str, values)) or 'nothing'}" if prompt is None else f"prompt {prompt!r}"
    require(isinstance(prompt, str), where, got, f"text named {' or '.join(PROMPT_NAMES)}", "add it")
    images, task = values.get("image") or (), values.get("task") or None
    images = (images,) if isinstance(images, str) else images
    good = isinstance(images, (list, tuple)) and all(isinstance(image, str) and image for image in images)
    require(good, where, f"image {images!r}", "a path or a list of paths", "correct it")
    if task is not None:
        require(isinstance(task, str), f"{where}: task", repr(task), "a name", "correct it")
        registry.check_name(TASKS, task, f"{where}: task")
    return Entry(place, prompt, tuple(images), task, values)


def _renamed(values: dict[str, Any], names: Sequence[str], where: str) -> dict[str, Any]:
    """Returns the values under the names `prompt`, `image`, `task`, for names in other case and synonyms."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).casefold()
        name = name if name in names or name in PROMPT_NAMES else key
        require(name not in found, where, f"{name} twice", "unique names", "rename one")
        found[name] = value
    own = next((name for name in PROMPT_NAMES if isinstance(found.get(name), str)), None)
    if own is not None and "prompt" not in found:
        found["prompt"] = found.pop(own)
    identity = found.get("id")
    if "image" not in found and isinstance(identity, str) and identity.lower().endswith(IMAGE_SUFFIXES):
        found["image"] = identity
    return found


def _say(text: str) -> None:
    print(f"note: prompts_file: {text}", file=sys.stderr)
