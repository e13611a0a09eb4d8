"""The items of a data source, and the report of an item that cannot be used.

Nothing is decoded here: images stay encoded bytes or paths until a row of a batch is made of them. Sources that draw
their images hand over the pixels.
"""

import contextlib
import dataclasses
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from blip3o_jax.data.config import TEXT_KEYS, SourceConfig
from blip3o_jax.errors import UserError, require
from blip3o_jax.files import parse_json
from blip3o_jax.text import tasks

T = TypeVar("T")

Picture = bytes | str | np.ndarray
"""An image: its encoded bytes, the path of its file, or its pixels uint8[Y X 3]."""

SHOWN_FIELDS = 20


class BrokenItem(Exception):
    """One item of a source that cannot be used: it is quarantined, and the run continues."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name = name
        self.reason = " ".join(reason.split())


@contextlib.contextmanager
def breaking(name: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns exceptions of these kinds into a BrokenItem of this name."""
    try:
        yield
    except kinds as error:
        raise BrokenItem(name, str(error)) from None


@dataclasses.dataclass(frozen=True)
class Origin:
    """The field that an item's text came from, or the fields that were tried."""

    field: str = ""  # that it came from
    looked_for: tuple[str, ...] = ()
    there: tuple[str, ...] = ()  # fields of the item
    asked: bool = False  # the options name the field: without it, an item is broken whatever its task


@dataclasses.dataclass(frozen=True)
class Example:
    """One item of a source."""

    task: str  # a key of text.tasks.TASKS, or package.module:attribute
    text: str | None  # caption or instruction; None where the item has none
    target: Picture | None  # None only where `arrays` stand for it
    references: tuple[Picture, ...] = ()
    name: str = ""  # names the item to a person: shard and key, file and line, path
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # precomputed fields of types.Batch
    origin: Origin = Origin()  # of the text

    def needed_text(self) -> str:
        """The text; "" if there is none and the task needs none.

        Raises:
          BrokenItem: there is none; names the fields that were tried and those present.
        """
        if self.text is None and (self.origin.asked or tasks.find(self.task).needs_text):
            looked_for, there = ", ".join(self.origin.looked_for), ", ".join(self.origin.there[:SHOWN_FIELDS])
            detail = f": looked for {looked_for}; the item has {there or 'no text'}" if looked_for else ""
            raise BrokenItem(self.name, f"no caption{detail}")
        return self.text or ""


class Source(Protocol):
    """A data format: random access to examples. A class or function that takes a `SourceConfig` returns one.

    A UserError raised while opening ends the command in one line. A source is pickled into the reading processes. It
    may have `skipped`, a `files.Skipped` of what it skipped, which `data check` shows.
    """

    def __len__(self) -> int:
        """Number of items, at least one."""

    def __getitem__(self, index: int) -> Example:
        """The item. Raises BrokenItem if it cannot be used: another one takes its place."""


def check_without_references(source: SourceConfig) -> None:
    """Raises UserError where a task needs references, for a kind whose items have none."""
    good, what = not tasks.find(source.task).needs_references, f"{source.path}: task of kind {source.kind}"
    require(good, what, source.task, "t2i or reconstruct", "use jsonl instead")


@dataclasses.dataclass(frozen=True)
class Broken:
    """A line of `quarantine.jsonl`."""

    source: str
    index: int
    name: str
    reason: str


def read_item(source: Source, index: int, path: str, make: Callable[[Example], T]) -> T | Broken:
    """What `make` makes of an item, or why the item cannot be used: `source[index]` or `make` raised BrokenItem."""
    try:
        return make(source[index])
    except BrokenItem as error:
        return Broken(path, index, error.name, error.reason)


def choose_text(fields: Mapping[str, Any], keys: Sequence[str], asked: str, name: str) -> tuple[str | None, Origin]:
    """The caption or instruction among the fields of an item, and where it came from.

    Args:
      keys: to look for; the first that holds more than white space counts.
      asked: the only key that counts, where the options name one.

    Raises:
      BrokenItem: what counts is no text.
    """
    keys = (asked,) if asked else tuple(keys)
    there = tuple(f"{key} (empty)" if _is_blank(value) else key for key, value in fields.items())
    origin = Origin("", keys, there, bool(asked))
    for key in keys:
        if not _is_blank(fields.get(key)):
            return as_text(fields[key], name), dataclasses.replace(origin, field=key)
    return None, origin


def text_beside(parts: Mapping[str, bytes], asked: str, name: str) -> tuple[str | None, Origin, dict[str, Any]]:
    """The caption of an image that has a `txt` and a `json` file beside it, and the content of the latter.

    Args:
      parts: contents of these files, as far as there are any: `txt`, `json`.
      asked: key of the JSON object, or `txt`; default: the first of `txt` and TEXT_KEYS that holds text.

    Raises:
      BrokenItem: other than a JSON object where the caption is not in the `txt`, or no text.
    """
    metadata = {}
    if "json" in parts:
        try:
            metadata = parse_json(parts["json"], "json", nan="null")
        except UserError as error:
            if asked or _is_blank(parts.get("txt")):
                raise BrokenItem(name, str(error)) from None
    fields = ({".txt": parts["txt"]} if "txt" in parts else {}) | metadata
    asked = ".txt" if asked == "txt" and asked not in metadata else asked
    return *choose_text(fields, (".txt", *TEXT_KEYS), asked, name), metadata


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str | bytes) and not value.strip())


def as_text(value: Any, name: str) -> str:
    """Checks that a caption is text and returns it.

    Args:
      value: str, or UTF-8 bytes.

    Raises:
      BrokenItem: bytes that are not UTF-8, another type, control characters.
    """
    if isinstance(value, (bytes, bytearray)):
        try:
            value = bytes(value).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BrokenItem(name, f"caption is not UTF-8 text: byte {error.start} cannot be decoded") from None
    if not isinstance(value, str):
        raise BrokenItem(name, f"caption is {type(value).__name__}, not text")
    control = next((c for c in value if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r\x85"), None)
    if control is not None:
        raise BrokenItem(name, f"caption is not text: it holds the control character U+{ord(control):04X}")
    return value
