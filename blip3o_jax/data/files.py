"""Files of a data set: patterns to lists of paths, and reads at an offset."""

import collections
import glob
import os
import re
import threading

from blip3o_jax.errors import UserError

MAX_OPEN = 64
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def expand(path: str, suffix: str) -> list[str]:
    """Lists the files that a path stands for, sorted.

    Args:
      path: a file; a directory, of which every file with `suffix` counts; a pattern with `*`, or a range `{000..099}`.
      suffix: with the dot.

    Raises:
      UserError: there is none.
    """
    braces = _BRACES.search(path)
    if braces:
        low, high = braces.groups()
        numbers = range(int(low), int(high) + 1)
        files = [path[: braces.start()] + str(n).zfill(len(low)) + path[braces.end() :] for n in numbers]
        missing = next((file for file in files if not os.path.isfile(file)), None)
        if missing:
            raise UserError(
                f"{path}: {missing} does not exist", expected="every number of the range", do="fix the range"
            )
    elif os.path.isdir(path):
        files = glob.glob(os.path.join(glob.escape(path), "**", f"*{suffix}"), recursive=True)
    else:
        files = [path] if os.path.isfile(path) else glob.glob(path, recursive=True)
    if not files:
        raise UserError(
            f"{path}: no {suffix} file found", expected="a file, a directory or a pattern", do="fix the path"
        )
    return sorted(files)


class OffsetReader(threading.local):
    """Reads byte ranges of many files. Every thread keeps its own last few files open; pickles as an empty one."""

    def __init__(self):
        self._open: collections.OrderedDict[str, int] = collections.OrderedDict()

    def __reduce__(self):
        return OffsetReader, ()

    def __del__(self):
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """The bytes at an offset.

        Raises:
          OSError: the file ends before, or cannot be read.
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
