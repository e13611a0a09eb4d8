"""Named tensors as views of memory-mapped files; names, shapes and types are checked before any byte is read."""

import dataclasses
import functools
import math
import mmap
import pathlib
from collections.abc import Callable, Mapping, Sequence

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


@dataclasses.dataclass(frozen=True)
class Tensor(TensorInfo):
    """A tensor that can be read. A source is a mapping from names to them.

    Attributes:
      origin: the file that holds it, for messages.
      read: gives a read-only view, whose bytes are fetched when it is used.
      release: frees the memory behind views, which stay valid: their bytes are fetched again when needed.
    """

    origin: str
    read: Callable[[], np.ndarray]
    release: Callable[[], None] = lambda: None


TensorSource = Mapping[str, Tensor]


def in_memory(arrays: Mapping[str, np.ndarray], origin: str = "memory") -> dict[str, Tensor]:
    """Arrays as a source."""
    return {key: Tensor(x.shape, x.dtype, origin, functools.partial(np.asarray, x)) for key, x in arrays.items()}


class MappedFile:
    """A file that is memory-mapped when the first of its tensors is read."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._map: mmap.mmap | None = None

    @property
    def memory(self) -> mmap.mmap:
        """The bytes of the file."""
        if self._map is None:
            with open(self._path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    def tensor(
        self, info: TensorInfo, offset: int, strides: tuple[int, ...] | None = None, span: int | None = None
    ) -> Tensor:
        """A tensor at a byte of the file.

        Args:
          info: shape and type.
          offset: bytes.
          strides: in elements; None: contiguous.
          span: bytes that it touches; None: `info.nbytes`.
        """
        span = info.nbytes if span is None else span

        def read() -> np.ndarray:
            if not info.size:
                return np.empty(info.shape, info.dtype)
            flat = np.frombuffer(self.memory, info.dtype, span // info.dtype.itemsize, offset)
            if strides is None:
                return flat.reshape(info.shape)
            steps = tuple(stride * flat.itemsize for stride in strides)
            return np.lib.stride_tricks.as_strided(flat, info.shape, steps, writeable=False)

        def release() -> None:
            start = offset - offset % mmap.PAGESIZE
            if self._map is not None and hasattr(mmap, "MADV_DONTNEED") and offset + span > start:
                self._map.madvise(mmap.MADV_DONTNEED, start, offset + span - start)

        return Tensor(info.shape, info.dtype, str(self._path), read, release)


def combined(parts: Sequence[tuple[str, TensorSource]]) -> dict[str, Tensor]:
    """Several sources as one; every key of a part gets the part's prefix.

    Raises:
      UserError: two parts hold the same key.
    """
    home: dict[str, Tensor] = {}
    for prefix, source in parts:
        for key, tensor in source.items():
            if twice := home.get(prefix + key):
                got = f"it twice, in {twice.origin} and {tensor.origin}"
                raise UserError(
                    f"tensor {prefix + key}", got=got, expected="one tensor", do="pass one of the two files"
                )
            home[prefix + key] = tensor
    return home
