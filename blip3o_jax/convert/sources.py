"""Named tensors that are read on demand, mostly views of memory-mapped files."""

import dataclasses
import functools
import math
import mmap
import pathlib
from collections.abc import Callable, Mapping, Sequence

import ml_dtypes
import numpy as np

from blip3o_jax.errors import require

DTYPES: dict[str, np.dtype] = {
    **{f"F{8 * size}": np.dtype(f"f{size}") for size in (8, 4, 2)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    **{f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (8, 4, 2, 1)},
    "BOOL": np.dtype(np.bool_),
}
"""Names in safetensors files -> dtypes."""
DTYPE_NAMES: dict[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Tensor(TensorInfo):
    """A stored tensor that can be read."""

    origin: str  # path of its file, for messages
    read: Callable[[], np.ndarray]  # usually returns a read-only view, whose pages are read from the file on first use
    release: Callable[[], None] = lambda: None  # drops the pages of the views, which stay valid


TensorSource = Mapping[str, Tensor]
"""Tensor name -> tensor."""


def in_memory(arrays: Mapping[str, np.ndarray], origin: str = "memory") -> dict[str, Tensor]:
    """Returns a source of arrays in memory."""
    return {key: Tensor(x.shape, x.dtype, origin, functools.partial(np.asarray, x)) for key, x in arrays.items()}


class MappedFile:
    """A file that is memory-mapped when its first tensor is read."""

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
        """Returns the tensor at an offset of the file.

        Args:
          offset: position of the first element in bytes.
          strides: strides in elements; None: contiguous.
          span: bytes from the first element to the end of the last one; None: `info.nbytes`.
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
    """Merges sources, with a prefix for the names of each; raises UserError if two have the same name."""
    home: dict[str, Tensor] = {}
    for prefix, source in parts:
        for key, tensor in source.items():
            name = prefix + key
            got = f"it twice, in {home.get(name, tensor).origin} and {tensor.origin}"
            require(name not in home, f"tensor {name}", got, "one tensor", "pass one of the two files")
            home[name] = tensor
    return home
