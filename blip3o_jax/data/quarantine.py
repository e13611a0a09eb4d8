"""Bookkeeping of items that could not be used: a file for people, and the share at which a run has to stop."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping

from blip3o_jax.errors import UserError

SETTLED_READS = 1000
"""The share is taken of at least so many reads: one broken item among the first ten is not 10 %."""


class Quarantine:
    """Counts reads and broken items, and lists each broken item once in `quarantine.jsonl`.

    Counts belong to the position in the data and are saved with it; the file is for people, and grows only.
    """

    def __init__(self, workdir: str | None, max_share: float, process_index: int = 0):
        """Takes the directory of the file (None: no file) and the share of broken items that is still accepted."""
        name = "quarantine.jsonl" if process_index == 0 else f"quarantine-{process_index}.jsonl"
        self.path = None if workdir is None else pathlib.Path(workdir) / name
        self.reads = 0
        self.broken = 0
        self._max_share = max_share
        self._listed = {(item["source"], item["index"]) for item in read(self.path)} if self.path else set()

    def add(self, reads: int, items: Iterable[Mapping]) -> None:
        """Counts reads, among them broken items: `source`, `index`, `name`, `reason`.

        Raises:
          UserError: the share of broken items is above the limit.
        """
        items = list(items)
        self.reads += reads
        self.broken += len(items)
        fresh = {(item["source"], item["index"]): item for item in items}
        fresh = {key: item for key, item in fresh.items() if key not in self._listed}
        if fresh and self.path:
            lines = "".join(json.dumps(dict(item), ensure_ascii=False) + "\n" for item in fresh.values())
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+") as file:
                cut = file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
                file.write((b"\n" if cut else b"") + lines.encode())
        self._listed |= set(fresh)
        if self.broken > self._max_share * max(self.reads, SETTLED_READS):
            last = items[-1]
            where = f", all in {self.path}" if self.path else ""
            raise UserError(
                f"data: {self.broken} of {self.reads} items read are broken, the last {last['name']} of "
                f"{last['source']}: {last['reason']} - expected at most {self._max_share:.2%} (data.max_broken_share) "
                f"- repair or remove them{where}"
            )


def read(path: str | os.PathLike) -> list[dict]:
    """The items of a quarantine file; none where it does not exist. A last line cut by a crash is left out."""
    items = []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    items.append(json.loads(line))
                except ValueError:
                    continue
    return items
