"""What a data source yields, and how an item that cannot be used is reported.

Nothing is decoded here: images stay encoded bytes or paths until a row of a batch is made of them. Sources that draw
their pictures hand over the pixels.
"""

import dataclasses
import unicodedata
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

Picture = bytes | str | np.ndarray
"""An image: its encoded bytes, the path of its file, or its pixels uint8[Y X 3]."""


class BrokenItem(Exception):
    """One item of a source that cannot be used: it is quarantined, and the run goes on."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name = name
        self.reason = " ".join(reason.split())


@dataclasses.dataclass(frozen=True)
class Example:
    """One item of a source."""

    task: str  # t2i | edit | reconstruct
    text: str | None  # caption or instruction; None where the item has none
    target: Picture | None  # None only where `arrays` stand for it
    references: tuple[Picture, ...] = ()
    name: str = ""  # names the item to a person: shard and key, file and line, path
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # precomputed fields of types.Batch


class Source(Protocol):
    """Random access to examples. Reading an item raises BrokenItem where the item is at fault."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def as_text(value: Any, name: str) -> str:
    """Checks that a caption is text and returns it.

    Args:
      value: str, or UTF-8 bytes.
      name: of the item, for the report.

    Raises:
      BrokenItem: bytes that are not UTF-8, another type, control characters, nothing but white space.
    """
    if isinstance(value, (bytes, bytearray)):
        try:
            value = bytes(value).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BrokenItem(name, f"caption is not UTF-8 text: byte {error.start} cannot be decoded") from None
    if not isinstance(value, str):
        raise BrokenItem(name, f"caption is {type(value).__name__}, not text")
    if not value.strip():
        raise BrokenItem(name, "caption is empty")
    control = next((c for c in value if unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r\x85"), None)
    if control is not None:
        raise BrokenItem(name, f"caption is not text: it holds the control character U+{ord(control):04X}")
    return value
