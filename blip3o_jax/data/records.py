"""Reads our ArrayRecord files and TFDS data sets, without tensorflow.

A record is a JSON header and binary parts behind it: encoded images as they were, arrays as raw little-endian bytes.
Records may carry precomputed `target_codes`, `ref_codes`, `target_latent`, `ref_latent` instead of images.
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from blip3o_jax.config import schema
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.example import BrokenItem, Example, as_text, breaking, choose_text
from blip3o_jax.data.files import Skipped, expand
from blip3o_jax.errors import UserError, require
from blip3o_jax.files import parse_json


@dataclasses.dataclass(frozen=True)
class RecordOptions:
    """Options of the kind `arrayrecord`."""

    text_key: str = ""  # of the metadata, instead of the text that the records were built with


@dataclasses.dataclass(frozen=True)
class TfdsOptions:
    """Options of the kind `tfds`. Keys are paths into the features, such as `captions/text`."""

    image: str = ""  # the target; default: the only image feature, or by name
    text: str = ""  # default: the only text feature, or by name; a class label gives its name
    references: str = ""  # an image or a sequence of images; default: by name, see tfds_features
    data_dir: str = ""  # where TFDS keeps prepared data sets; default: its own


def encode(example: Example) -> bytes:
    """Writes an example as one record; images must be bytes."""
    parts, images = [], [image for image in (example.target, *example.references) if image is not None]
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
    parts = [json.dumps(header, ensure_ascii=False, default=str).encode(), *images]
    parts += [array.tobytes() for array in arrays.values()]
    return struct.pack("<I", len(parts[0])) + b"".join(parts)


def decode(record: bytes) -> Example:
    """Reads what `encode` wrote.

    Raises:
      ValueError: it is something else.
    """
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
    """Records of ArrayRecord files."""

    def __init__(self, source: SourceConfig):
        import grain

        self._options = schema.from_dict(RecordOptions, source.options, f"options of {source.path}")
        self._task = source.task
        self.skipped = Skipped()
        self._paths = expand(source.path, (".array_record",), self.skipped)
        try:
            self._data = grain.sources.ArrayRecordDataSource(self._paths)
            self._length = len(self._data)
        except Exception as error:  # the reader raises whatever its C++ half reports
            raise UserError(
                f"{source.path}: {error}", expected="whole ArrayRecord files", do="build them again"
            ) from None
        require(self._length, source.path, "no records", "at least one", "build it again")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        name = f"{os.path.basename(self._paths[0])}:{index}"
        with breaking(name, ValueError, RuntimeError, OSError):
            example = decode(self._data[index])
        if self._options.text_key:
            fields = {"text": example.text, **example.metadata}
            text, origin = choose_text(fields, (), self._options.text_key, name)
            example = dataclasses.replace(example, text=text, origin=origin)
        return dataclasses.replace(example, task=self._task)


class Tfds:
    """A split of a TFDS data set whose files allow random access."""

    def __init__(self, source: SourceConfig):
        from blip3o_jax.data import tfds_features

        options = schema.from_dict(TfdsOptions, source.options, f"options of {source.path}")
        self._task = source.task
        self._path = source.path
        builder, split = tfds_features.open_builder(source.path, options.data_dir)
        self._chosen = tfds_features.choose(builder.info.features, options, source)
        self._asked = options.text
        self._data = tfds_features.open_split(builder, split, self._chosen, source.path)
        self._label = tfds_features.label_names(builder.info.features, self._chosen.text)
        self._named = "name" in builder.info.features

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Example:
        name = f"{os.path.basename(self._path)}:{index}"
        with breaking(name, ValueError, RuntimeError, OSError):
            row = self._data[index]
        name = as_text(row["name"], name) if self._named and row["name"] else name
        chosen = self._chosen
        fields = {key: _first(_lookup(row, key)) for key in chosen.texts}
        if self._label and fields.get(chosen.text) is not None:
            fields[chosen.text] = self._label[int(fields[chosen.text])]
        text, origin = choose_text(fields, (chosen.text,) if chosen.text else (), self._asked, name)
        images = _encoded(_lookup(row, chosen.image), chosen.image, name)
        if not images:
            raise BrokenItem(name, f"{chosen.image} is empty")
        references = ()
        if chosen.references:
            references = _encoded(_lookup(row, chosen.references), chosen.references, name)
        return Example(self._task, text, images[0], references, name, origin=origin)


def _encoded(value: Any, key: str, name: str) -> tuple[bytes, ...]:
    """The encoded images of a feature: of one, or of each of a sequence."""
    values = (value,) if isinstance(value, bytes) else tuple(value if value is not None else ())
    if not all(isinstance(each, bytes) for each in values):
        raise BrokenItem(name, f"{key} holds no encoded image")
    return values


def _lookup(row: Mapping[str, Any], path: str) -> Any:
    for key in path.split("/"):
        row = row[key]
    return row


def _first(value: Any) -> Any:
    """The first of a sequence, such as the captions of one image."""
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim):
        return value[0] if len(value) else None
    return value
