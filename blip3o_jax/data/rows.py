"""Random access to the rows of JSON Lines, JSON arrays, and CSV and TSV files with a header.

A file is scanned once for the positions of its rows; a row is parsed when it is read.
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np

from blip3o_jax.data.example import BrokenItem, breaking
from blip3o_jax.data.files import OffsetReader
from blip3o_jax.errors import UserError, require
from blip3o_jax.files import MAX_BYTES, parse_json, read_bytes

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
MAX_ROW_BYTES = 2**24
_BLOCK = 1 << 22
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")


class Rows:
    """The concatenated rows of one or several files."""

    def __init__(self, paths: Sequence[str]):
        self._paths = paths
        self._columns, spans = zip(*map(_open, paths))
        self._file_of = np.repeat(np.arange(len(spans)), [len(each) for each in spans])
        self._spans = np.concatenate(spans)
        self._reader = OffsetReader()

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> tuple[str, str, dict]:
        """Returns the path of the file, the name of the row and its content; raises BrokenItem if it is invalid."""
        path, columns = self._paths[self._file_of[index]], self._columns[self._file_of[index]]
        offset, size, number = (int(value) for value in self._spans[index])
        name = f"{os.path.basename(path)}:{number}"
        if size > MAX_ROW_BYTES:
            raise BrokenItem(name, f"row of {size:,} bytes, of which {MAX_ROW_BYTES:,} are read")
        with breaking(name, OSError):
            data = self._reader.read(path, offset, size)
        if columns:
            return path, name, _cells(data, path, columns, name)
        with breaking(name, UserError):
            return path, name, parse_json(data, "row", nan="null")


def _cells(data: bytes, path: str, columns: Sequence[str], name: str) -> dict[str, str]:
    """Parses the row `name` of a table; raises BrokenItem if it is invalid."""
    try:
        cells = next(_reader(io.StringIO(data.decode("utf-8-sig"), newline=""), path))
    except (csv.Error, UnicodeDecodeError) as error:
        raise BrokenItem(name, f"row cannot be read: {error}") from None
    if len(cells) > len(columns):
        raise BrokenItem(name, f"{len(cells)} cells under {len(columns)} columns: a text with a comma needs quotes")
    return {column: cell for column, cell in zip(columns, cells) if column}


def _open(path: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Finds the rows of a file; raises UserError for an array or table that cannot be split into rows.

    Returns:
      The columns of a table, () for JSON; and i64[rows 3]: byte offset, size, number of the line or element from 1.
    """
    if os.path.splitext(path)[1].lower() in DELIMITERS:
        return _csv_table(path)
    with open(path, "rb") as file:
        head = file.read(4096).removeprefix(_BOM).lstrip()
    return (), _array_spans(path) if head.startswith(b"[") else _line_spans(path)


def _line_spans(path: str) -> np.ndarray:
    """Finds the lines that are not blank."""
    ends, visible = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]  # and the visible bytes before every end
    size = seen = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            data = np.frombuffer(block, np.uint8)
            counts, breaks = np.cumsum(data > ord(" ")) + seen, np.flatnonzero(data == ord("\n"))
            ends.append(breaks + size + 1)
            visible.append(counts[breaks])
            size, seen = size + len(block), counts[-1]
    ends, visible = np.concatenate([*ends, [size]]), np.concatenate([*visible, [seen]])
    spans = np.stack([ends[:-1], np.diff(ends), np.arange(1, len(ends))], axis=1)
    return spans[np.diff(visible) > 0]


def _array_spans(path: str) -> np.ndarray:
    """Finds the elements of a JSON array, decoded as Latin-1 so that positions are byte offsets."""
    fits = os.path.getsize(path) <= MAX_BYTES
    require(fits, path, "an array of more than 1 GiB", "one object a line", f"run `jq -c '.[]' {path}`")
    text = read_bytes(path, "rows").decode("latin-1")
    decode = json.JSONDecoder().raw_decode
    position, spans = text.index("[") + 1, []
    try:
        while text[position := _SPACE.match(text, position).end()] != "]":
            if spans:
                if text[position] != ",":
                    raise ValueError(f"no comma at byte {position}")
                position = _SPACE.match(text, position + 1).end()
            start = position
            _, position = decode(text, start)
            spans.append((start, position - start, len(spans) + 1))
        rest = text[position + 1 :].strip()
    except (ValueError, IndexError, RecursionError) as error:
        reason = "it ends early" if isinstance(error, IndexError) else str(error)
        raise UserError(path, got=f"element {len(spans) + 1}: {reason}", expected="a JSON array", do="fix it") from None
    require(not rest, path, "text after the array", "one JSON array", "fix it")
    return np.array(spans, np.int64).reshape(-1, 3)


def _csv_table(path: str) -> tuple[tuple[str, ...], np.ndarray]:
    spans = []
    with open(path, "rb") as file:
        lines = iter(lambda: file.readline(MAX_ROW_BYTES), b"")
        reader = _reader((line.decode("utf-8" if number else "utf-8-sig") for number, line in enumerate(lines)), path)
        try:
            columns = tuple(name.strip() for name in next(reader, ()))
            start, line = file.tell(), reader.line_num
            for cells in reader:
                if cells:
                    spans.append((start, file.tell() - start, line + 1))
                start, line = file.tell(), reader.line_num
        except (csv.Error, UnicodeDecodeError) as error:
            number = reader.line_num + isinstance(error, UnicodeDecodeError)  # such a line is not counted yet
            got = f"line {number}: {error}"
            raise UserError(path, got=got, expected="a UTF-8 table with a header", do="fix it") from None
    names = [name for name in columns if name]
    require(len(names) == len({*names}), path, f"columns {', '.join(columns)}", "each name once", "rename one")
    return columns or ("",), np.array(spans, np.int64).reshape(-1, 3)


def _reader(lines: Iterator[str], path: str):
    return csv.reader(lines, delimiter=DELIMITERS[os.path.splitext(path)[1].lower()], strict=True)
