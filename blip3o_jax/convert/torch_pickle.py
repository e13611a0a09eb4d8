"""Reads `torch.save` files without torch and without running anything they contain.

The format: an uncompressed zip archive with `PREFIX/data.pkl`, a pickle whose tensors point at the archive's members
`PREFIX/data/KEY`. The unpickler here knows tensors, storages, ordered dictionaries and plain containers; any other name
in the pickle is refused, so a hostile file cannot run code. Tensor bytes are mapped, not read.
"""

import collections
import dataclasses
import pathlib
import pickle
import struct
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

from blip3o_jax.convert.sources import MappedFile, Placement, TensorInfo
from blip3o_jax.errors import UserError

LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of a zip member; its name and extra field follow

STORAGE_DTYPES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as the pickle describes it: strides and offset in elements of a storage."""

    storage: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


def read_pickle(path: pathlib.Path) -> Any:
    """The object that `torch.save` wrote, with a `Tensor` in place of every tensor.

    Raises:
      UserError: not such a file, cut short, or it contains anything but tensors and plain containers.
    """
    with _archive(path) as archive:
        name = _pickle_name(path, archive)
        try:
            with archive.open(name) as file:
                return _Unpickler(path, file).load()
        except UserError:
            raise
        except (pickle.UnpicklingError, EOFError, KeyError, IndexError, TypeError, ValueError, AttributeError,
                zipfile.BadZipFile) as error:  # fmt: skip
            raise UserError(
                f"{path}: unreadable ({error})", expected="a torch.save file", do="fetch it again"
            ) from None


def open_state_dict(path: pathlib.Path, tensors: dict[str, Tensor]) -> MappedFile:
    """A source of tensors of a file.

    Args:
      path: the file that `read_pickle` read.
      tensors: the part of its object that is a state dict.

    Raises:
      UserError: a storage is missing or too small.
    """
    placements = {}
    with _archive(path) as archive:
        base = _pickle_name(path, archive).removesuffix("data.pkl")
        extents = {}
        with open(path, "rb") as file:
            for member in archive.infolist():
                extents[member.filename] = (_data_offset(file, member), member)
    for key, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {key} is a {type(tensor).__name__}", expected="a tensor", do="pass a state dict")
        offset, member = extents.get(f"{base}data/{tensor.storage}", (0, None))
        info = TensorInfo(tensor.shape, tensor.dtype)
        steps = zip(tensor.shape, tensor.strides, strict=True)
        last = sum((size - 1) * stride for size, stride in steps) if info.size else -1
        span = (last + 1) * tensor.dtype.itemsize
        begin = tensor.offset * tensor.dtype.itemsize
        if min(tensor.offset, *tensor.strides, 0) < 0 or member is None or begin + span > member.file_size:
            raise UserError(f"{path}: the bytes of {key} are missing", expected="a whole file", do="fetch it again")
        if member.compress_type != zipfile.ZIP_STORED:
            raise UserError(
                f"{path}: a compressed archive", expected="what torch.save writes", do="save it again with torch"
            )
        placements[key] = Placement(info, offset + begin, tensor.strides, span)
    return MappedFile(path, placements)


def _archive(path: pathlib.Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise UserError(f"{path}: missing", expected="a torch.save file", do="correct the path") from None
    except zipfile.BadZipFile:
        raise UserError(
            f"{path}: not a zip archive",
            expected="a whole file of torch.save (torch 1.6 or later)",
            do="fetch it again, or load and save it once with torch",
        ) from None


def _pickle_name(path: pathlib.Path, archive: zipfile.ZipFile) -> str:
    names = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(names) != 1:
        raise UserError(f"{path}: {len(names)} members called data.pkl", expected="one", do="pass a torch.save file")
    order = names[0].removesuffix("data.pkl") + "byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise UserError(f"{path}: big-endian", expected="little-endian numbers", do="save it again on a common machine")
    return names[0]


def _data_offset(file, member: zipfile.ZipInfo) -> int:
    file.seek(member.header_offset)
    fields = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    return member.header_offset + LOCAL_HEADER.size + fields[-2] + fields[-1]


def _rebuild_tensor(storage, offset, shape, strides, *_) -> Tensor:
    key, dtype = storage
    return Tensor(key, dtype, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _rebuild_parameter(tensor, *_) -> Tensor:
    return tensor


ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
    **{("torch", name): _StorageType(dtype) for name, dtype in STORAGE_DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Builds what ALLOWED names, nothing else."""

    def __init__(self, path: pathlib.Path, file):
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise UserError(
                f"{self._path}: contains {module}.{name}",
                expected="tensors and plain containers only",
                do="it is not loaded, since it could run code; save its state dict again with torch",
            )
        return ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> tuple[str, np.dtype]:
        kind, storage, key = pid[0], pid[1], pid[2]
        if kind != "storage" or not isinstance(storage, _StorageType):
            raise UserError(
                f"{self._path}: a storage of an unknown kind", expected="tensors", do="save it again with torch"
            )
        return str(key), storage.dtype
