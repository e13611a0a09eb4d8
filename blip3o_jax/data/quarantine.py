"""Lists broken items in a file, and stops a run if their share is too large."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable

from blip3o_jax.data.example import Broken
from blip3o_jax.errors import UserError, require
from blip3o_jax.files import append_line, parse_json, read_bytes

SETTLED_READS = 1000
"""During a run the share is that of at least so many reads, so that one broken item among the first ten is no error."""


class Quarantine:
    """Counts reads and broken items, and lists each broken item once in `quarantine.jsonl`.

    The counts belong to the position in the data, with which they are saved; the file only grows.
    """

    def __init__(self, workdir: str | None, max_share: float, process_index: int = 0):
        """`workdir` is the directory of the file; None: no file. Every process has a file of its own."""
        name = "quarantine.jsonl" if process_index == 0 else f"quarantine-{process_index}.jsonl"
        self.path = None if workdir is None else pathlib.Path(workdir) / name
        self.reads = 0
        self.broken = 0
        self._max_share = max_share
        self._listed = {_key(item): item for item in read(self.path)} if self.path else {}
        self._last = ""  # broken item, for the message

    def add(self, reads: int, items: Iterable[Broken]) -> None:
        """Adds reads and the broken items among them.

        Raises:
          UserError: the share of broken items is above the limit.
        """
        items = list(items)
        self.reads += reads
        self.broken += len(items)
        fresh = {_key(item): item for item in items if _key(item) not in self._listed}
        if fresh and self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for item in fresh.values():
                append_line(self.path, json.dumps(dataclasses.asdict(item), ensure_ascii=False))
        self._listed |= fresh
        if items:
            self._last = f", the last {items[-1].name} of {items[-1].source}: {items[-1].reason}"
        self._check(max(self.reads, SETTLED_READS))

    def recall(self, source: str, indices: range) -> None:
        """Adds items that an earlier run has read; those listed in the file are broken. Raises as `add`."""
        self.add(len(indices), [item for key, item in self._listed.items() if key[0] == source and key[1] in indices])

    def finish(self) -> None:
        """Checks the exact share, after everything has been read. Raises as `add`."""
        self._check(self.reads)

    def _check(self, reads: int) -> None:
        what = f"data: {self.broken} of {self.reads} items read are broken{self._last}"
        expected = f"at most {self._max_share:.2%} (data.max_broken_share)"
        do = f"repair or remove them{f', all in {self.path}' if self.path else ''}"
        require(self.broken <= self._max_share * reads, what, None, expected, do)


def _key(item: Broken) -> tuple[str, int]:
    return item.source, item.index


def read(path: str | os.PathLike) -> list[Broken]:
    """Reads a quarantine file; a missing file is empty, and incomplete lines are skipped."""
    items = []
    if os.path.exists(path):
        for line in read_bytes(path, "quarantine").decode(errors="replace").split("\n"):
            with contextlib.suppress(UserError, TypeError):  # TypeError: other fields
                items.append(Broken(**parse_json(line, "quarantine")))
    return items
