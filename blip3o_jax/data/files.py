"""Lists the files of a data set, counts skipped files, and reads files at an offset."""

import collections
import glob
import os
import pathlib
import re
import threading
from collections.abc import Sequence

from blip3o_jax.errors import require

MAX_OPEN = 64
SHOWN_NAMES = 3
JUNK = ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin")
MANIFEST = "precompute.json"  # how the precomputed files beside it were made
OWN_SUFFIXES = (".index.npy", MANIFEST, "quarantine.jsonl")  # of files beside data that are not counted as skipped
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Skipped(dict[str, tuple[int, tuple[str, ...]]]):
    """Skipped files of a source: reason -> their count and first names."""

    def add(self, reason: str, *names: str, count: int | None = None) -> None:
        """Adds items; `count` overrides the number of names."""
        number, shown = self.get(reason, (0, ()))
        self[reason] = number + (len(names) if count is None else count), (*shown, *names)[:SHOWN_NAMES]

    def lines(self) -> list[str]:
        """Returns a line for every reason."""
        lines = []
        for reason, (count, names) in self.items():
            shown = ", ".join(names) + (", ..." if count > len(names) else "")
            lines.append(f"{count} skipped: {reason}{f' ({shown})' if names else ''}")
        return lines

    def in_brackets(self) -> str:
        """Returns all lines in brackets, to end a message; "" if nothing was skipped."""
        return f" ({'; '.join(self.lines())})" if self else ""


def place(path: str) -> str:
    """Expands `~` and environment variables in a path."""
    return os.path.expanduser(os.path.expandvars(path))


def is_junk(name: str) -> bool:
    """Returns whether a file or folder is hidden or a system file."""
    return name.startswith(".") or name.lower() in JUNK


def walk(directory: str, skipped: Skipped) -> list[str]:
    """Lists all regular files below a directory, sorted, and counts all other entries in `skipped`.

    Links are followed; every directory is read once.

    Raises:
      OSError: a directory cannot be read.
    """
    found, waiting, links = [], [directory], []
    above = pathlib.Path(os.path.realpath(directory)).parents
    seen = {_identity(parent) for parent in above}  # links upwards are not followed
    while waiting or links:
        current = waiting.pop() if waiting else links.pop()
        if _identity(current) in seen:
            skipped.add("a link to a folder above, or one that is read already", os.path.relpath(current, directory))
            continue
        seen.add(_identity(current))
        with os.scandir(current) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if is_junk(entry.name):
                    skipped.add("hidden, or of the operating system", os.path.relpath(entry.path, directory))
                elif entry.is_dir():
                    (links if entry.is_symlink() else waiting).append(entry.path)
                elif entry.is_file():
                    found.append(entry.path)
                else:
                    skipped.add("not a regular file, or a broken link", os.path.relpath(entry.path, directory))
    return sorted(found)


def _identity(directory: str | os.PathLike) -> tuple[int, int]:
    facts = os.stat(directory)
    return facts.st_dev, facts.st_ino


def expand(path: str, suffixes: Sequence[str], skipped: Skipped) -> list[str]:
    """Lists the files of a path, sorted.

    Args:
      path: a file, a directory, a pattern with `*`, or any of these with a range `{000..099}`.
      suffixes: suffixes of the files of directories and patterns, lower case with the dot.
      skipped: counts all other files.

    Raises:
      UserError: no files, or a file of the range is missing.
    """
    kind = f"no {' or '.join(suffixes)} file"
    if braces := _BRACES.search(path):
        low, high = braces.groups()
        files = []
        for number in range(int(low), int(high) + 1):
            name = f"{path[: braces.start()]}{number:0{len(low)}d}{path[braces.end() :]}"
            there = _BRACES.search(name) or os.path.isfile(name)
            require(there, f"{path}: {name} does not exist", None, "every number of the range", "fix the range")
            files += expand(name, suffixes, skipped)
        require(bool(files), path, kind, "a range that counts upwards", "fix the range")
        return files
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        found = walk(path, skipped)
    else:
        found = [file for file in glob.glob(path, recursive=True) if not os.path.isdir(file)]
    files = []
    ending = re.compile(rf"({'|'.join(map(re.escape, suffixes))})(-\d+-of-\d+)?$", re.IGNORECASE)
    for file in sorted(found):
        if ending.search(file) and os.path.isfile(file):
            files.append(file)
        elif not file.endswith(OWN_SUFFIXES):
            skipped.add(kind, os.path.basename(file))
    what, expected = f"{path}: {kind} found{skipped.in_brackets()}", "a file, a directory or a pattern"
    require(bool(files), what, None, expected, "fix the path")
    return files


class OffsetReader(threading.local):
    """Reads byte ranges of files. Every thread keeps its most recent files open; they are not pickled."""

    def __init__(self):
        self._open: collections.OrderedDict[str, int] = collections.OrderedDict()

    def __reduce__(self):
        return OffsetReader, ()

    def __del__(self):
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Reads `size` bytes at an offset; raises OSError if the file cannot be read, or ends too early."""
        descriptor = self._open.pop(path, None)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY)
        self._open[path] = descriptor
        if len(self._open) > MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        data = b""
        while len(data) < size:
            more = os.pread(descriptor, size - len(data), offset + len(data))
            if not more:
                raise OSError(f"{path} ends at byte {offset + len(data)}, {size - len(data)} bytes too early")
            data += more
        return data
