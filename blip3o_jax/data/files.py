"""Lists the files of a data set, counts skipped files, and reads files at an offset."""

import collections
import glob
import os
import pathlib
import re
import threading
from collections.abc import Iterable, Sequence

from blip3o_jax.errors import UserError, require

MAX_OPEN = 64
SHOWN_NAMES = 3
JUNK = ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin")
OWN_SUFFIXES = (".index.npy",)
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


def place(path: str) -> str:
    """Expands `~` and environment variables in a path."""
    return os.path.expanduser(os.path.expandvars(path))


def is_junk(name: str) -> bool:
    """Returns whether a file or folder is hidden or a system file."""
    return name.startswith(".") or name.lower() in JUNK


def walk(directory: str, skipped: Skipped) -> list[str]:
    """Lists all regular files below a directory, sorted. Links are followed; every directory is read once.

    Args:
      directory: the directory.
      skipped: counts all other entries.

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
    if braces := _BRACES.search(path):
        low, high = braces.groups()
        numbers = (f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1))
        names = (path[: braces.start()] + number + path[braces.end() :] for number in numbers)
        files = [file for name in names for file in _numbered(path, name, suffixes, skipped)]
        require(bool(files), path, f"no {' or '.join(suffixes)} file", "a range that counts upwards", "fix the range")
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
            skipped.add(f"no {' or '.join(suffixes)} file", os.path.basename(file))
    if not files:
        there = "; ".join(skipped.lines())
        raise UserError(
            f"{path}: no {' or '.join(suffixes)} file found{f' ({there})' if there else ''}",
            expected="a file, a directory or a pattern",
            do="fix the path",
        )
    return files


def _numbered(path: str, file: str, suffixes: Sequence[str], skipped: Skipped) -> Iterable[str]:
    if not _BRACES.search(file) and not os.path.isfile(file):
        raise UserError(f"{path}: {file} does not exist", expected="every number of the range", do="fix the range")
    return expand(file, suffixes, skipped)


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
        """Reads `size` bytes at an offset.

        Raises:
          OSError: the file cannot be read, or ends too early.
        """
        descriptor = self._open.pop(path, None)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY)
        self._open[path] = descriptor
        if len(self._open) > MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        data = os.pread(descriptor, size, offset)
        while len(data) < size:
            more = os.pread(descriptor, size - len(data), offset + len(data))
            if not more:
                raise OSError(f"{path} ends at byte {offset + len(data)}, {size - len(data)} bytes too early")
            data += more
        return data
