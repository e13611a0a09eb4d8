"""The items of a data source, and broken items.

Images are not decoded here: an item has their encoded bytes or paths, or pixels if the source renders them.
"""

import contextlib
import dataclasses
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from blip3o_jax.data.config import TEXT_KEYS, SourceConfig
from blip3o_jax.errors import UserError, require, type_of
from blip3o_jax.files import parse_json
from blip3o_jax.text import tasks

T = TypeVar("T")

Picture = bytes | str | np.ndarray
"""An image: its encoded bytes, the path of its file, or its pixels uint8[Y X 3]."""

SHOWN_FIELDS = 20  # that a message lists


class BrokenItem(Exception):
    """Raised for an item that cannot be used. It is quarantined, and the run continues with another item."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name = name
        self.reason = " ".join(reason.split())


@contextlib.contextmanager
def breaking(name: str, *kinds: type[Exception]) -> Iterator[None]:
    """Converts exceptions of the given types to a BrokenItem with the given name."""
    try:
        yield
    except kinds as error:
        raise BrokenItem(name, str(error)) from None


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the text of an item was searched for and found."""

    field: str = ""  # the field with the text
    looked_for: tuple[str, ...] = ()  # fields that may contain it
    there: tuple[str, ...] = ()  # fields of the item
    asked: bool = False  # the options name the field; an item without it is broken, even if its task needs no text


@dataclasses.dataclass(frozen=True)
class Example:
    """One item of a source; raises UserError for a field of another type."""

    task: str  # a key of text.tasks.TASKS, or package.module:attribute
    text: str | None  # caption or instruction; None: the item has none
    target: Picture | None  # None: `arrays` contains its codes and latent
    references: tuple[Picture, ...] = ()
    name: str = ""  # for messages: shard and key, file and line, or path
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # precomputed fields of types.Batch
    origin: Origin = Origin()  # of the text

    def __post_init__(self):
        text, references, do = self.text, self.references, "correct the data format"
        require(isinstance(self.name, str), f"{self.name!r}: name", type_of(self.name), "a string", do)
        require(isinstance(text, str | None), f"{self.name}: text", type_of(text), "a string or None", do)
        several = isinstance(references, tuple | list)
        require(several, f"{self.name}: references", type_of(references), "a tuple of images", do)
        for name in ("metadata", "arrays"):
            value = getattr(self, name)
            require(isinstance(value, Mapping), f"{self.name}: {name}", type_of(value), "a dictionary", do)
        for picture in references if self.target is None else (self.target, *references):
            known = isinstance(picture, Picture)
            require(known, f"{self.name}: image", type_of(picture), "bytes, a path as a string, or an array", do)

    def needed_text(self) -> str:
        """Returns the text; "" if it is missing and the task needs none.

        Raises:
          BrokenItem: the text is missing; the message lists the fields searched and those present.
        """
        if self.text is None and (self.origin.asked or tasks.find(self.task).needs_text):
            looked_for, there = ", ".join(self.origin.looked_for), ", ".join(self.origin.there[:SHOWN_FIELDS])
            detail = f": looked for {looked_for}; the item has {there or 'no text'}" if looked_for else ""
            raise BrokenItem(self.name, f"no caption{detail}")
        return self.text or ""

    def needed_target(self) -> Picture:
        """Returns the target image; raises BrokenItem if there is none."""
        if self.target is None:
            raise BrokenItem(self.name, f"no image{', only precomputed arrays' if self.arrays else ''}")
        return self.target


class Source(Protocol):
    """Random access to the examples of a data set, returned by a class or function that takes a `SourceConfig`.

    Opening a source may raise UserError. A source must be picklable, since it is sent to the reader processes, and
    several threads read it at a time. It may have an attribute `skipped`, a `files.Skipped`, which `data check`
    reports.
    """

    def __len__(self) -> int:
        """Number of items, at least one."""

    def __getitem__(self, index: int) -> Example:
        """Returns an item; raises BrokenItem if it can never be used. A run repeats only if this does not vary."""


def check_without_references(source: SourceConfig) -> None:
    """Raises UserError if the task needs references; for kinds whose items have none."""
    good, what = not tasks.find(source.task).needs_references, f"{source.path}: task of kind {source.kind}"
    require(good, what, source.task, "t2i or reconstruct", "use jsonl instead")


@dataclasses.dataclass(frozen=True)
class Broken:
    """A broken item: a line of `quarantine.jsonl`."""

    source: str
    index: int
    name: str
    reason: str


def read_item(source: Source, index: int, path: str, make: Callable[[Example], T]) -> T | Broken:
    """Returns `make(source[index])`, or a Broken if reading or `make` raises BrokenItem."""
    try:
        return make(source[index])
    except BrokenItem as error:
        return Broken(path, index, error.name, error.reason)


def choose_text(fields: Mapping[str, Any], keys: Sequence[str], asked: str, name: str) -> tuple[str | None, Origin]:
    """Chooses the caption or instruction of an item: the first of the fields `keys` that is not blank.

    `asked`, unless it is empty, is the only key that is searched; `name` is the item's, for messages. Returns the text,
    or None, and its origin; raises BrokenItem if the chosen field is not text.
    """
    keys = (asked,) if asked else tuple(keys)
    there = tuple(f"{key} (empty)" if _is_blank(value) else key for key, value in fields.items())
    field = next((key for key in keys if not _is_blank(fields.get(key))), "")
    return as_text(fields[field], name) if field else None, Origin(field, keys, there, bool(asked))


def text_beside(parts: Mapping[str, bytes], asked: str, name: str) -> tuple[str | None, Origin, dict[str, Any]]:
    """Chooses the caption of an image with a `txt` or `json` file beside it.

    Args:
      parts: contents of the files that exist: `txt`, `json`.
      asked: key of the JSON object, or `txt`; "": the first of `txt` and TEXT_KEYS that is not blank.
      name: that of the item, for messages.

    Returns:
      The text, or None; its origin; the JSON object.

    Raises:
      BrokenItem: the caption is not text, or would be in a `json` file that is not a JSON object.
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
    """Returns a caption, a string or UTF-8 bytes, as a string.

    Raises:
      BrokenItem: another type, bytes that are not UTF-8, or control characters.
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
