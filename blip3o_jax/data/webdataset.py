"""Random access to WebDataset tar shards. An item consists of the members with one key: an image, and its caption in
`txt` or `json`.

The key is the name of a member without its last suffix, so a key may contain dots. As in WebDataset, `KEY.part.jpg` is
a further part of the item KEY, if that exists and the part has no caption of its own. The members of a key need not be
adjacent; if a shard contains a key twice, each time with adjacent members, these are two items.

Shards are indexed once. The index of a shard is a numpy file beside it, or in the user's cache directory if that is not
writable. It records the size and time of the shard. It is memory-mapped, so many shards and workers take little memory.
Compressed shards are an error, since they do not allow random access.

Source: the WebDataset naming convention (where the key ends at the first dot of the file name).
Differs from the reference: it streams shards through one process and replaces broken items by random ones.
"""

import concurrent.futures
import contextlib
import hashlib
import io
import multiprocessing
import os
import pathlib
import sys
import tarfile
import zlib

import numpy as np

from blip3o_jax.data.config import SourceConfig, TextOptions
from blip3o_jax.data.example import BrokenItem, Example, breaking, check_without_references, text_beside
from blip3o_jax.data.files import OffsetReader, Skipped, expand, is_junk
from blip3o_jax.data.images import MAX_FILE_BYTES, suffixes
from blip3o_jax.errors import UserError, require
from blip3o_jax.files import write_whole

PARTS = ("image", "txt", "json")
MAX_BYTES = {"image": MAX_FILE_BYTES, "txt": 2**24, "json": 2**24}
PARALLEL_FROM = 16  # fewest shards without an index that are indexed by several processes
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}
_ABSENT = (-1, 0)

HIDDEN, NO_FILE, OTHER, FURTHER, SECOND, ALONE = REASONS = (
    "hidden, or of the operating system",
    "not a regular file",
    "suffix of neither image nor caption",
    "further part of an item",
    "second image or caption of an item",
    "json without an image or caption",
)

Runs = dict[str, list[dict[str, tuple[str, int, int]]]]
"""Stem -> its runs of adjacent members: part -> (name, offset, size)."""


class WebDataset:
    """The items of a list of shards."""

    def __init__(self, source: SourceConfig):
        check_without_references(source)
        self._task = source.task
        self._options = source.read_options(TextOptions)
        self.skipped = Skipped()
        self._paths = expand(source.path, (".tar",), self.skipped)
        _build_missing(self._paths)
        self._indices: dict[int, np.ndarray] = {}  # of the shards read so far
        counts = []
        for path in self._paths:
            items, passed = tar_index(path)
            counts.append(len(items))
            for row in passed:
                reason, count = row["txt"].tolist()
                self.skipped.add(REASONS[reason], row["key"].decode(errors="backslashreplace"), count=count)
        self._ends = np.cumsum(counts)
        self._reader = OffsetReader()

    def __getstate__(self):
        return self.__dict__ | {"_indices": {}}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        if shard not in self._indices:
            self._indices[shard], _ = tar_index(self._paths[shard])
        row = self._indices[shard][index - (int(self._ends[shard - 1]) if shard else 0)]
        path, key = self._paths[shard], row["key"].decode(errors="backslashreplace")
        name = f"{os.path.basename(path)}/{key}"
        parts = {part: self._read(path, *row[part].tolist(), part, name) for part in PARTS if row[part][0] >= 0}
        if "image" not in parts:
            raise BrokenItem(name, f"no image: {key} has {' and '.join(parts)} alone")
        text, origin, metadata = text_beside(parts, self._options.text_key, name)
        return Example(self._task, text, parts["image"], (), name, metadata, origin=origin)

    def _read(self, path: str, offset: int, size: int, part: str, name: str) -> bytes:
        if size > MAX_BYTES[part]:
            raise BrokenItem(name, f"{part} of {size:,} bytes, of which {MAX_BYTES[part]:,} are read")
        with breaking(name, OSError):
            return self._reader.read(path, offset, size)


def tar_index(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the index of a shard, from its file if that is valid and up to date.

    Returns:
      Items: structured rows with `key` and, for `image`, `txt` and `json`, i64[2]: offset (-1: absent) and size.
      Skipped members: rows with `key`, the name of the first such member, and `txt`, i64[2]: index in REASONS, count.

    Raises:
      UserError: the shard is not a tar file, compressed, or truncated.
    """
    stat = os.stat(path)
    for file in _index_files(path):
        if os.path.isfile(file):
            with contextlib.suppress(Exception):  # numpy raises many types for a damaged file
                rows = np.lib.format.open_memmap(file, mode="r")
                return _checked(rows, stat)
    items, passed = _scan(path)
    stamp = (_stamp(), (stat.st_size, stat.st_mtime_ns), (len(items), 0), (0, 0))
    width = max(len(row[0]) for row in (stamp, *items, *passed))
    rows = np.array([stamp, *items, *passed], [("key", f"S{width}"), *((part, "<i8", (2,)) for part in PARTS)])
    content = io.BytesIO()
    np.save(content, rows)
    for file in _index_files(path):
        with contextlib.suppress(OSError, UserError):  # read-only, or not a regular file
            os.makedirs(os.path.dirname(file), exist_ok=True)
            write_whole(file, content.getvalue())
            break
    return _checked(rows, stat)


def _stamp() -> bytes:
    """Returns the start of an index: its version, and a hash of the image suffixes."""
    return b"blip3o_jax tar index 2 %08x" % zlib.crc32(" ".join(suffixes()).encode())


def _checked(rows: np.ndarray, stat: os.stat_result) -> tuple[np.ndarray, np.ndarray]:
    """Returns the items and skipped members of an index; raises ValueError if it is invalid for the shard."""
    kind = rows.dtype
    good = rows.ndim == 1 and kind.names == ("key", *PARTS) and kind["key"].kind == "S"
    good = good and all(kind[part] == np.dtype(("<i8", (2,))) for part in PARTS)
    good = good and rows[0]["key"] == _stamp() and rows[0]["image"].tolist() == [stat.st_size, stat.st_mtime_ns]
    if not good or not 0 <= (count := int(rows[0]["txt"][0])) < len(rows):
        raise ValueError("another index")
    items, passed = rows[1 : 1 + count], rows[1 + count :]
    for part in PARTS:
        offset, size = items[part][:, 0], items[part][:, 1]
        if ((offset < -1) | (size < 0) | (offset > stat.st_size - size)).any():
            raise ValueError("outside the shard")
    if ((passed["txt"][:, 0] < 0) | (passed["txt"][:, 0] >= len(REASONS))).any():
        raise ValueError("an unknown reason")
    return items, passed


def _scan(path: str) -> tuple[list[tuple], list[tuple]]:
    """Reads all headers of a shard; returns the rows of its items and of skipped members."""
    runs: Runs = {}
    skipped = Skipped()
    with open(path, "rb") as file:
        head = file.read(6)
        kind = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)
        require(not kind, path, f"{kind}", "an uncompressed tar, for random access", "decompress it")
        file.seek(0)
        try:
            last = None
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.size < 0:
                        raise tarfile.ReadError(f"a member of {member.size} bytes")
                    last = _place(member, last, runs, skipped)
                end = tar.offset
            file.seek(end)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError(f"no end-of-archive mark at byte {end}")
        except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
            what = f"{path}: truncated or damaged ({error})"
            raise UserError(what, expected="a complete tar file", do="fetch it again") from None
    items = _items(runs, skipped)
    rows = [(_encoded(stem), *(run.get(part, ("", *_ABSENT))[1:] for part in PARTS)) for stem, run in items]
    facts = ((names[0], (REASONS.index(reason), count)) for reason, (count, names) in skipped.items())
    return rows, [(_encoded(name), _ABSENT, fact, _ABSENT) for name, fact in facts]


def _place(member: tarfile.TarInfo, last: str | None, runs: Runs, skipped: Skipped) -> str | None:
    """Adds a member to the runs of its stem; returns the stem, or `last` if the member is skipped."""
    name = os.path.normpath(member.name)
    stem, suffix = os.path.splitext(name)
    part = "image" if suffix.lower() in suffixes() else {".txt": "txt", ".json": "json"}.get(suffix.lower())
    if member.isdir():
        return last
    junk = any(is_junk(each) for each in name.split("/") if each != "..")
    no_file = not member.isfile() or member.issparse()
    if junk or no_file or part is None:
        skipped.add(HIDDEN if junk else NO_FILE if no_file else OTHER, name)
        return last
    found = runs.setdefault(stem, [{}])
    if (stem != last and found[-1]) or found[-1].get(part, ("",))[0] == name:
        found.append({})
    if part in found[-1]:
        skipped.add(SECOND, name)
    else:
        found[-1][part] = name, member.offset_data, member.size
    return stem


def _items(runs: Runs, skipped: Skipped) -> list[tuple[str, dict]]:
    """Returns (stem, members) of every item, in the order of the shard."""
    items = []
    for stem, found in runs.items():
        parts = [part for run in found for part in run]
        if len(parts) == len(set(parts)):
            found = [{part: member for run in found for part, member in run.items()}]
        start = stem.rfind("/") + 2  # the shortest key
        owned = any(stem[:dot] in runs for dot in range(start, len(stem)) if stem[dot] == ".")
        for run in found:
            whole = "image" in run and len(run) > 1
            if owned and not whole:
                for name, *_ in run.values():
                    skipped.add(FURTHER, name)
            elif run.keys() == {"json"}:
                skipped.add(ALONE, run["json"][0])
            else:
                items.append((stem, run))
    return sorted(items, key=lambda item: min(offset for _, offset, _ in item[1].values()))


def _encoded(name: str) -> bytes:
    return name.encode(errors="surrogateescape")


def _index_files(path: str) -> tuple[str, str]:
    """Returns the possible paths of an index: beside the shard, and in the cache directory."""
    path = os.path.abspath(path)
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "blip3o_jax" / "tar_index"
    return f"{path}.index.npy", str(cache / f"{hashlib.blake2b(path.encode(), digest_size=16).hexdigest()}.npy")


def _build_missing(paths: list[str]) -> None:
    """Indexes shards without an index in parallel, if there are many."""
    missing = [path for path in paths if not any(os.path.exists(file) for file in _index_files(path))]
    if len(missing) < PARALLEL_FROM or multiprocessing.current_process().daemon:
        return
    print(f"indexing {len(missing)} tar shards (once)", file=sys.stderr)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
        for _ in pool.map(_touch, missing, chunksize=4):
            pass


def _touch(path: str) -> None:
    tar_index(path)
