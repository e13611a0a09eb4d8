"""Random access to WebDataset tar shards: consecutive members of one key are an item, `jpg|png|webp` its image and
`txt` or `json` its caption.

Shards are indexed once. The index of a shard is a numpy file beside it (in the user's cache directory where that
cannot be written), stamped with the shard's size and time, and memory-mapped, so that neither many shards nor many
workers cost memory. Compressed shards cannot be read at random and are refused.

Source: the WebDataset naming convention (the key ends at the first dot of the file's name).
Differs from the reference: it streams shards through one process and replaces items that fail by random ones.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import sys
import tarfile
import tempfile

import numpy as np

from blip3o_jax.config import schema
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.example import BrokenItem, Example, as_text
from blip3o_jax.data.files import OffsetReader, expand
from blip3o_jax.errors import UserError
from blip3o_jax.text import tasks

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
PARTS = ("image", "text", "json")
TEXT_KEYS = ("caption", "text", "txt", "prompt")
PARALLEL_FROM = 16  # shards without an index from which several processes read them
_STAMP = b"blip3o_jax tar index 1"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the kind `webdataset`."""

    text_key: str = ""  # of the caption in a `json` member; default: the first of caption, text, txt, prompt


class WebDataset:
    """The items of a list of shards."""

    def __init__(self, source: SourceConfig):
        if tasks.find(source.task).needs_references:
            raise UserError(
                f"{source.path}: webdataset with task {source.task}",
                expected="t2i or reconstruct",
                do="use jsonl instead",
            )
        self._task = source.task
        self._options = schema.from_dict(Options, source.options, f"options of {source.path}")
        self._paths = expand(source.path, ".tar")
        _build_missing(self._paths)
        self._indices: dict[int, np.ndarray] = {}
        counts = [len(self._index(shard)) for shard in range(len(self._paths))]
        self._ends = np.cumsum(counts)
        self._reader = OffsetReader()

    def __getstate__(self):
        return self.__dict__ | {"_indices": {}}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        row = self._index(shard)[index - (int(self._ends[shard - 1]) if shard else 0)]
        path, key = self._paths[shard], row["key"].decode(errors="backslashreplace")
        name = f"{os.path.basename(path)}/{key}"
        parts = {}
        for part in PARTS:
            offset, size = (int(number) for number in row[part])
            if offset >= 0:
                try:
                    parts[part] = self._reader.read(path, offset, size)
                except OSError as error:
                    raise BrokenItem(name, str(error)) from None
        if "image" not in parts:
            raise BrokenItem(name, f"no image: no member {key}.{{{','.join(IMAGE_SUFFIXES)}}}")
        metadata = _metadata(parts.get("json"), name)
        text = parts.get("text", _caption(metadata, self._options.text_key))
        text = None if text is None else as_text(text, name)
        return Example(self._task, text, parts["image"], (), name, metadata)

    def _index(self, shard: int) -> np.ndarray:
        if shard not in self._indices:
            self._indices[shard] = tar_index(self._paths[shard])
        return self._indices[shard]


def tar_index(path: str) -> np.ndarray:
    """The index of a shard, from its file where that is up to date.

    Returns:
      Structured rows [items] with `key` and, for `image`, `text`, `json`, i64[2]: offset (-1: absent) and size.

    Raises:
      UserError: not a tar file, compressed, or cut short.
    """
    stat = os.stat(path)
    stamp = (_STAMP, (stat.st_size, stat.st_mtime_ns), (0, 0), (0, 0))
    for file in _index_files(path):
        with contextlib.suppress(OSError, ValueError, EOFError):
            rows = np.load(file, mmap_mode="r")
            if rows.dtype.names == ("key", *PARTS) and rows[0]["key"] == _STAMP and tuple(rows[0]["image"]) == stamp[1]:
                return rows[1:]
    items = _scan(path)
    width = max([len(_STAMP), *(len(item[0]) for item in items)])
    pair = ("<i8", (2,))
    dtype = np.dtype([("key", f"S{width}"), *((part, *pair) for part in PARTS)])
    rows = np.array([stamp, *items], dtype)
    for file in _index_files(path):
        with contextlib.suppress(OSError):
            _save(file, rows)
            break
    return rows[1:]


def _scan(path: str) -> list[tuple]:
    """Reads all headers of a shard: rows of (key, image, text, json)."""
    items, key, parts = [], None, {}
    with open(path, "rb") as file:
        head = file.read(6)
        kind = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)
        if kind:
            raise UserError(
                f"{path}: compressed with {kind}", expected="a plain tar, to read it at random", do="decompress it"
            )
        try:
            with tarfile.open(fileobj=_rewound(file), mode="r:") as tar:
                for member in tar:
                    directory, base = os.path.split(member.name)
                    stem, _, suffix = base.partition(".")
                    part = _part(suffix.lower())
                    if not member.isfile() or part is None:
                        continue
                    if os.path.join(directory, stem) != key:
                        items += _item(key, parts)
                        key, parts = os.path.join(directory, stem), {}
                    parts.setdefault(part, (member.offset_data, member.size))
                end = tar.offset
            file.seek(end)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError(f"no end-of-archive mark at byte {end}")
        except tarfile.TarError as error:
            raise UserError(
                f"{path}: cut short or damaged ({error})", expected="a whole tar", do="fetch it again"
            ) from None
    return items + _item(key, parts)


def _part(suffix: str) -> str | None:
    return "image" if suffix in IMAGE_SUFFIXES else {"txt": "text", "json": "json"}.get(suffix)


def _item(key: str | None, parts: dict) -> list[tuple]:
    """The row of one key; members of other kinds alone make none."""
    absent = (-1, 0)
    if not {"image", "text"} & set(parts):
        return []
    return [(key.encode(errors="surrogateescape"), *(parts.get(part, absent) for part in ("image", "text", "json")))]


def _rewound(file):
    file.seek(0)
    return file


def _metadata(data: bytes | None, name: str) -> dict:
    if data is None:
        return {}
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BrokenItem(name, f"json member cannot be read: {error}") from None
    if not isinstance(metadata, dict):
        raise BrokenItem(name, "json member is not an object")
    return metadata


def _caption(metadata: dict, text_key: str):
    keys = (text_key,) if text_key else TEXT_KEYS
    return next((metadata[key] for key in keys if key in metadata), None)


def _index_files(path: str) -> tuple[str, str]:
    """Where an index may stand: beside the shard, or in the cache directory."""
    path = os.path.abspath(path)
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "blip3o_jax" / "tar_index"
    return f"{path}.index.npy", str(cache / f"{hashlib.blake2b(path.encode(), digest_size=16).hexdigest()}.npy")


def _save(file: str, rows: np.ndarray) -> None:
    os.makedirs(os.path.dirname(file), exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=os.path.dirname(file), suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as out:
            np.save(out, rows)
        os.replace(aside, file)
    except BaseException:
        os.unlink(aside)
        raise


def _build_missing(paths: list[str]) -> None:
    """Indexes many new shards in several processes: reading headers is slow in one."""
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
