"""Where tensors are read from: views of memory-mapped files, named, typed and checked before any byte is touched."""

import dataclasses
import math
import mmap
import pathlib
from collections.abc import Mapping
from typing import Protocol

import ml_dtypes
import numpy as np

from blip3o_jax.errors import UserError

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
DTYPE_NAMES: dict[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a stored tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class TensorSource(Protocol):
    """Named tensors that can be read one at a time."""

    info: Mapping[str, TensorInfo]

    def read(self, key: str) -> np.ndarray:
        """A read-only view; bytes are fetched when it is used."""

    def release(self, key: str) -> None:
        """Lets go of the memory behind views of `key`; they stay valid and would be fetched again."""

    def origin(self, key: str) -> str:
        """The file that holds `key`, for messages."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one tensor lies in a file; `strides` in elements, None for a contiguous one."""

    info: TensorInfo
    offset: int
    strides: tuple[int, ...] | None = None
    span: int | None = None  # bytes from `offset` on that the tensor touches, if not `info.nbytes`


class MappedFile:
    """Tensors of one file, memory-mapped; `metadata` is what it says beside them."""

    def __init__(
        self, path: pathlib.Path, placements: Mapping[str, Placement], metadata: Mapping[str, str] | None = None
    ):
        self.path, self.metadata = path, dict(metadata or {})
        self.placements = dict(placements)
        self.info = {key: place.info for key, place in self.placements.items()}
        self._map: mmap.mmap | None = None

    def read(self, key: str) -> np.ndarray:
        place = self.placements[key]
        if not place.info.size:
            return np.empty(place.info.shape, place.info.dtype)
        if self._map is None:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        span = place.info.nbytes if place.span is None else place.span
        flat = np.frombuffer(self._map, place.info.dtype, span // place.info.dtype.itemsize, place.offset)
        if place.strides is None:
            return flat.reshape(place.info.shape)
        steps = tuple(stride * flat.itemsize for stride in place.strides)
        return np.lib.stride_tricks.as_strided(flat, place.info.shape, steps, writeable=False)

    def release(self, key: str) -> None:
        if self._map is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        place = self.placements[key]
        start = place.offset - place.offset % mmap.PAGESIZE
        length = place.offset + (place.info.nbytes if place.span is None else place.span) - start
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, start, length)

    def origin(self, key: str) -> str:
        return str(self.path)


class Views:
    """Tensors of several sources under names of their own."""

    def __init__(self, home: Mapping[str, tuple[TensorSource, str]]):
        """Takes name -> source, and the name there."""
        self._home = dict(home)
        self.info = {name: source.info[key] for name, (source, key) in self._home.items()}

    def read(self, key: str) -> np.ndarray:
        source, name = self._home[key]
        return source.read(name)

    def release(self, key: str) -> None:
        source, name = self._home[key]
        source.release(name)

    def origin(self, key: str) -> str:
        source, name = self._home[key]
        return source.origin(name)


def renamed(source: TensorSource, names: Mapping[str, str]) -> Views:
    """Some tensors of a source, under other names: new name -> name in `source`."""
    return Views({name: (source, key) for name, key in names.items()})


def combined(parts: list[tuple[str, TensorSource]]) -> Views:
    """Several sources as one; every key of a part gets the part's prefix.

    Raises:
      UserError: two parts hold the same key.
    """
    home: dict[str, tuple[TensorSource, str]] = {}
    for prefix, source in parts:
        for key in source.info:
            if prefix + key in home:
                first = home[prefix + key][0].origin(home[prefix + key][1])
                got = f"it twice, in {first} and {source.origin(key)}"
                raise UserError(
                    f"tensor {prefix + key}", got=got, expected="one tensor", do="pass only one of the two files"
                )
            home[prefix + key] = (source, key)
    return Views(home)


class Arrays:
    """Tensors in memory."""

    def __init__(self, arrays: Mapping[str, np.ndarray], where: str):
        """Takes key -> tensor, and what they are, for messages."""
        self._arrays, self._where = dict(arrays), where
        self.info = {key: TensorInfo(array.shape, array.dtype) for key, array in self._arrays.items()}

    def read(self, key: str) -> np.ndarray:
        return self._arrays[key]

    def release(self, key: str) -> None:
        pass

    def origin(self, key: str) -> str:
        return self._where
