"""Encodes examples as records of ArrayRecord files.

A record consists of the size of the header (u32), a JSON header, encoded images, and arrays as raw little-endian bytes.
Precomputed records have `target_codes`, `ref_codes`, `target_latent` and `ref_latent` instead of images.
"""

import dataclasses
import json
import math
import os
import struct

import numpy as np

from blip3o_jax.data.config import SourceConfig, TextOptions
from blip3o_jax.data.example import BrokenItem, Example, breaking, choose_text
from blip3o_jax.data.files import Skipped, expand
from blip3o_jax.errors import UserError, require
from blip3o_jax.files import parse_json


def encode(example: Example) -> bytes:
    """Encodes an example, whose images are bytes or None, as a record."""
    images = [image for image in (example.target, *example.references) if image is not None]
    arrays = {key: np.ascontiguousarray(array) for key, array in example.arrays.items()}
    header = {
        "task": example.task,
        "text": example.text,
        "name": example.name,
        "metadata": dict(example.metadata),
        "target": example.target is not None,
        "images": [len(image) for image in images],
        "arrays": [[key, array.dtype.str, list(array.shape)] for key, array in arrays.items()],
    }
    text = json.dumps(header, ensure_ascii=False, default=str).encode()
    return b"".join((struct.pack("<I", len(text)), text, *images, *(array.tobytes() for array in arrays.values())))


def decode(record: bytes) -> Example:
    """Decodes a record; raises ValueError if it is not one of `encode`."""
    try:
        (size,) = struct.unpack_from("<I", record)
        header = parse_json(record[4 : 4 + size], "header", nan="null")
        position, images, arrays = 4 + size, [], {}
        for length in header["images"]:
            images.append(record[position : position + _natural(length)])
            position += length
        for key, dtype, shape in header["arrays"]:
            count = math.prod(map(_natural, shape))
            arrays[key] = np.frombuffer(record, np.dtype(dtype), count, position).reshape(shape)
            position += arrays[key].nbytes
        if position != len(record):
            raise ValueError("parts do not add up")
        target = images.pop(0) if header["target"] else None
        text, origin = choose_text(header, ("text",), "", header["name"])
        metadata = dict(header["metadata"])
        return Example(header["task"], text, target, tuple(images), header["name"], metadata, arrays, origin)
    except (struct.error, KeyError, IndexError, TypeError, ValueError, BrokenItem) as error:
        raise ValueError(f"not a record of this package: {error}") from error


def _natural(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"a size of {value!r}")
    return value


class ArrayRecords:
    """The records of ArrayRecord files."""

    def __init__(self, source: SourceConfig):
        import grain

        self._options = source.read_options(TextOptions)
        self._task, self._name = source.task, os.path.basename(os.path.normpath(source.path))
        self.skipped = Skipped()
        try:
            self._data = grain.sources.ArrayRecordDataSource(expand(source.path, (".array_record",), self.skipped))
            self._length = len(self._data)
        except Exception as error:  # the C++ reader raises many types
            expected, do = "complete ArrayRecord files", "build them again"
            raise UserError(f"{source.path}: {error}", expected=expected, do=do) from None
        require(self._length, source.path, "no records", "at least one", "build it again")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        name = f"{self._name}:{index}"
        with breaking(name, ValueError, RuntimeError, OSError):
            example = decode(self._data[index])
        if self._options.text_key:
            fields = {"text": example.text, **example.metadata}
            text, origin = choose_text(fields, (), self._options.text_key, name)
            example = dataclasses.replace(example, text=text, origin=origin)
        return dataclasses.replace(example, task=self._task)
