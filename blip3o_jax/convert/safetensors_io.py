"""Reads and writes safetensors files, one tensor at a time.

A file consists of the length of the header (u64, little-endian), the header (JSON: name -> dtype, shape, [begin, end]
relative to the end of the header), and the bytes of the tensors. Headers are parsed here, since the safetensors library
gives no offsets, which reading windows needs, and accepts duplicate names. Several files have an index,
`NAME.safetensors.index.json`, with `weight_map`: tensor -> file.
"""

import json
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from blip3o_jax import files
from blip3o_jax.convert.sources import DTYPE_NAMES, DTYPES, MappedFile, Tensor, TensorInfo, TensorSource
from blip3o_jax.convert.staging import check_space
from blip3o_jax.errors import UserError

MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
MAX_DIMENSIONS = 32
SHARD_BYTES = 5_000_000_000
WRITE_BYTES = 64_000_000  # bytes per write call


def open_file(path: pathlib.Path) -> dict[str, Tensor]:
    """Returns the tensors of a file; see `open_with_metadata`."""
    return open_with_metadata(path)[0]


def open_with_metadata(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Opens a safetensors file; returns name -> tensor, and the metadata of the header.

    Raises UserError if the file is missing, truncated or of another kind, or its tensors overlap or leave gaps.
    """
    if not path.is_file():
        found = "not a file" if path.exists() else "missing"
        raise UserError(f"{path}: {found}", expected="a safetensors file", do="fetch the checkpoint again")
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= MAX_HEADER:
            raise _broken(path, f"{size} bytes that do not start with a header")
        header = file.read(length)
    if len(header) < length:
        raise _broken(path, f"{size} bytes, of which the header alone needs {8 + length}")
    try:
        entries = files.parse_json(header, "header")
    except UserError as error:
        raise _broken(path, str(error).partition(" - expected")[0]) from error
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "invalid __metadata__")
    spans = {key: _span(path, key, entry) for key, entry in entries.items()}
    end = 0
    for key, (info, begin) in sorted(spans.items(), key=lambda item: (item[1][1], item[1][0].nbytes)):
        if begin != end:
            raise _broken(path, f"{'a hole' if begin > end else 'an overlap'} of bytes before tensor {key}")
        end += info.nbytes
    if 8 + length + end != size:
        raise _broken(path, f"{size} bytes, {8 + length + end} announced")
    file = MappedFile(path)
    return {key: file.tensor(info, 8 + length + begin) for key, (info, begin) in spans.items()}, metadata


def write_weights(
    directory: pathlib.Path,
    source: TensorSource,
    name: str = "model",
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors in their order, with one of them in memory at a time.

    Args:
      directory: existing directory; the caller removes incomplete files.
      name: file name without suffix.
      shard_bytes: size limit of a file with more than one tensor; several files get an index.
      metadata: metadata for the header of every file.

    Raises:
      UserError: not enough free disk space.
    """
    total = sum(tensor.nbytes for tensor in source.values())
    check_space(directory, total)
    shards = _split(source, shard_bytes)
    if len(shards) == 1:
        _write_file(directory / f"{name}.safetensors", source, metadata)
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        path = directory / f"{name}-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(path, shard, metadata)
        weight_map.update(dict.fromkeys(shard, path.name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_file(path: pathlib.Path, source: TensorSource, metadata: Mapping[str, str] | None) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for key, tensor in source.items():
        begin, end = end, end + tensor.nbytes
        header[key] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, tensor in source.items():
            value = np.asarray(tensor.read(), order="C")
            assert value.dtype == tensor.dtype and value.shape == tensor.shape, (key, value.dtype, value.shape)
            flat = value.reshape(-1).view(np.uint8)
            for start in range(0, flat.size, WRITE_BYTES):
                file.write(flat[start : start + WRITE_BYTES])


def _split(source: TensorSource, shard_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for key, tensor in source.items():
        if shards[-1] and used + tensor.nbytes > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][key] = tensor
        used += tensor.nbytes
    return shards


def _span(path: pathlib.Path, key: str, entry: object) -> tuple[TensorInfo, int]:
    """Validates an entry of the header; returns shape and dtype, and the offset of the tensor."""

    def numbers(value: object) -> bool:
        return isinstance(value, list) and all(type(each) is int and 0 <= each < 2**63 for each in value)

    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (entry.get(name) for name in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not numbers(shape) or not numbers(offsets) or len(offsets) != 2:
        raise _broken(path, f"tensor {key} without dtype, shape and two data_offsets")
    if dtype not in DTYPES or len(shape) > MAX_DIMENSIONS:
        raise _broken(path, f"tensor {key} of type {dtype} and {len(shape)} dimensions")
    info = TensorInfo(tuple(shape), DTYPES[dtype])
    if offsets[1] - offsets[0] != info.nbytes:
        raise _broken(path, f"tensor {key} with {info.nbytes} bytes at {offsets}")
    return info, offsets[0]


def _broken(path: pathlib.Path, got: str) -> UserError:
    return UserError(f"{path}: {got}", expected="a complete safetensors file", do="fetch it again")
