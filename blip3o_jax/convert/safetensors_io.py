"""Reading and writing safetensors files, one or several with an index, a tensor at a time.

A file is: u64 little-endian length of the header, the header (JSON: name -> dtype, shape, [begin, end] relative to the
end of the header), the bytes. The index is `NAME.safetensors.index.json` with `weight_map`: tensor -> file.
"""

import json
import math
import pathlib
import shutil
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from blip3o_jax.convert.sources import DTYPE_NAMES, DTYPES, Combined, MappedFile, Placement, TensorInfo, TensorSource
from blip3o_jax.errors import UserError

MAX_HEADER = 100_000_000  # bytes; a longer one is not a header
SHARD_BYTES = 5_000_000_000
WRITE_BYTES = 64_000_000  # of one write call


def open_file(path: pathlib.Path) -> MappedFile:
    """Tensors of one safetensors file.

    Raises:
      UserError: the file is missing, cut short or not a safetensors file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= MAX_HEADER:
                raise _broken(path, f"{size} bytes that do not start with a header")
            header = file.read(length)
    except FileNotFoundError:
        raise UserError(f"{path}: missing", expected="a safetensors file", do="fetch the checkpoint again") from None
    if len(header) < length:
        raise _broken(path, f"{size} bytes, of which the header alone needs {8 + length}")
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        placements = {key: _placement(entry, 8 + length) for key, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _broken(path, "a header that cannot be read") from None
    end = max((place.offset + place.info.nbytes for place in placements.values()), default=8 + length)
    if end > size:
        raise _broken(path, f"{size} bytes, {end} announced")
    return MappedFile(path, placements)


def open_weights(directory: pathlib.Path, name: str = "model") -> TensorSource | None:
    """Tensors of `directory/name.safetensors` or of the shards that `name.safetensors.index.json` lists.

    Returns:
      None if neither is there.

    Raises:
      UserError: a shard or the index is missing, a shard is cut short or does not hold what the index says, or there
        is one file beside an index of others.
    """
    index, single = directory / f"{name}.safetensors.index.json", directory / f"{name}.safetensors"
    if not index.exists():
        shards = list(directory.glob(f"{name}-*-of-*.safetensors"))
        if shards and not single.exists():
            raise UserError(
                f"{directory}: {len(shards)} shards without {index.name}", expected="it", do="fetch it as well"
            )
        return open_file(single) if single.exists() else None
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: unreadable", expected="JSON with a weight_map", do="fetch it again") from None
    if single.exists() and single.name not in names:
        raise UserError(
            f"{directory}: both {single.name} and {index.name}, which lists other files",
            expected="one of them",
            do="delete what is left over from another checkpoint",
        )
    missing = [file for file in names if not (directory / file).is_file()]
    if missing:
        raise UserError(
            f"{directory}: {len(missing)} of {len(names)} weight files are missing ({', '.join(missing[:3])})",
            expected=f"all that {index.name} lists",
            do="fetch the checkpoint again",
        )
    files = {file: open_file(directory / file) for file in names}
    for key, file in weight_map.items():
        if key not in files[file].info:
            raise UserError(
                f"{directory / file}: no tensor {key}",
                expected=f"it as {index.name} says",
                do="the files are of different checkpoints; fetch them again",
            )
    return Combined([("", file) for file in files.values()])


def write_weights(
    directory: pathlib.Path,
    tensors: Mapping[str, TensorInfo],
    produce: Callable[[str], np.ndarray],
    name: str = "model",
    shard_bytes: int = SHARD_BYTES,
) -> list[pathlib.Path]:
    """Writes tensors in the given order, holding one at a time.

    Args:
      directory: an existing one; the caller makes sure that nothing half-written stays.
      tensors: what will be written.
      produce: key -> the tensor, of the announced shape and dtype.
      name: of the files, without suffix.
      shard_bytes: a file takes no further tensor beyond this many bytes; with several files an index is written.

    Returns:
      The files, the index last.

    Raises:
      UserError: not enough free disk space.
    """
    total = sum(info.nbytes for info in tensors.values())
    free = shutil.disk_usage(directory).free
    if total > free:
        raise UserError(
            f"{directory}: {free / 1e9:.1f} GB free",
            expected=f"{total / 1e9:.1f} GB for the weights",
            do="free some space",
        )
    shards = _split(tensors, shard_bytes)
    if len(shards) == 1:
        return [_write_file(directory / f"{name}.safetensors", shards[0], tensors, produce)]
    paths, weight_map = [], {}
    for number, keys in enumerate(shards, start=1):
        path = directory / f"{name}-{number:05d}-of-{len(shards):05d}.safetensors"
        paths.append(_write_file(path, keys, tensors, produce))
        weight_map.update(dict.fromkeys(keys, path.name))
    index = directory / f"{name}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2))
    return [*paths, index]


def _write_file(path, keys, tensors, produce) -> pathlib.Path:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key in keys:
        info = tensors[key]
        header[key] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in keys:
            value = np.asarray(produce(key), order="C")
            expected = tensors[key]
            assert value.dtype == expected.dtype and value.shape == expected.shape, (key, value.dtype, value.shape)
            flat = value.reshape(-1).view(np.uint8)
            for start in range(0, flat.size, WRITE_BYTES):
                file.write(flat[start : start + WRITE_BYTES])
    return path


def _split(tensors: Mapping[str, TensorInfo], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for key, info in tensors.items():
        if shards[-1] and used + info.nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(key)
        used += info.nbytes
    return shards


def _placement(entry: dict, base: int) -> Placement:
    begin, end = entry["data_offsets"]
    info = TensorInfo(tuple(int(size) for size in entry["shape"]), DTYPES[entry["dtype"]])
    if not 0 <= begin <= end or end - begin != math.prod(info.shape) * info.dtype.itemsize:
        raise ValueError(entry)
    return Placement(info, base + begin)


def _broken(path: pathlib.Path, got: str) -> UserError:
    return UserError(f"{path}: {got}", expected="a complete safetensors file", do="fetch it again")
