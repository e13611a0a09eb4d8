"""Reads `torch.save` files without PyTorch and without executing anything in them.

A file is a zip archive of uncompressed members: `PREFIX/data.pkl` is a pickle of protocol 2 whose tensors refer to the
members `PREFIX/data/KEY`. A small interpreter of its opcodes builds numbers, strings, lists, tuples, dictionaries and
descriptions of tensors. All other opcodes and names are rejected, so a file cannot run code or access objects of this
process. Tensors are memory-mapped, and verified against the CRC of their member on first use.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import pickletools
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from blip3o_jax.convert.sources import MappedFile, TensorInfo
from blip3o_jax.convert.sources import Tensor as StoredTensor
from blip3o_jax.errors import UserError, require

LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # of a zip member; its name and extra field follow
MAX_PICKLE_BYTES = 2**25
MAX_OPCODES = 2**20
MAX_ITEMS = 2**20  # values in the object; shared ones count every time
MAX_DEPTH = 32
MAX_RANK = 16
CRC_CHUNK = 2**24

STORAGE_DTYPES: dict[str, np.dtype] = {
    "torch DoubleStorage": np.dtype(np.float64),
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
    "torch.storage UntypedStorage": np.dtype(np.uint8),  # for TENSOR_DTYPES, which are named by the tensor
}
TENSOR_DTYPES: dict[str, np.dtype] = {
    "torch float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "torch float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "torch uint16": np.dtype(np.uint16),
    "torch uint32": np.dtype(np.uint32),
    "torch uint64": np.dtype(np.uint64),
}
CALLS = {  # function -> numbers of arguments
    "collections OrderedDict": (0,),
    "torch Size": (1,),
    "torch._utils _rebuild_tensor_v2": (6, 7),
    "torch._utils _rebuild_tensor_v3": (7, 8),
    "torch._utils _rebuild_parameter": (3,),
}


@dataclasses.dataclass(frozen=True)
class Storage:
    """A member of the archive: key, dtype and number of elements."""

    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as described in the pickle; offset and strides are in elements of its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements of the storage from the first to the last one in use."""
        steps = zip(self.shape, self.strides, strict=True)
        return 1 + sum((size - 1) * stride for size, stride in steps) if 0 not in self.shape else 0


@dataclasses.dataclass(frozen=True)
class _Name:
    """A name imported by the pickle: `module attribute`."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Member:
    """Position of a member in the file; crc None: the file was written without checksums."""

    offset: int
    size: int
    crc: int | None


def read_pickle(path: pathlib.Path) -> Any:
    """Reads the object of a `torch.save` file, with a `Tensor` for every tensor.

    Raises:
      UserError: the file is of another kind, truncated or damaged, or contains other than tensors and plain containers.
    """
    with _members(path) as (file, base, members):
        data = _contents(path, file, members, f"{base}data.pkl", MAX_PICKLE_BYTES)
        order = f"{base}byteorder"
        if order in members and _contents(path, file, members, order, 16) != b"little":
            raise UserError(f"{path}: big-endian", expected="little-endian numbers", do="save it again on a common one")
    try:
        value = _Interpreter().run(data)
        _check_plain(value)
    except _Foreign as error:
        do = "it is not loaded, since it could run code; save its state dict again with torch"
        raise UserError(f"{path}: contains {error}", expected="tensors and plain containers only", do=do) from None
    except (ValueError, IndexError, KeyError, TypeError) as error:
        reason = f"its pickle refers to nothing, {error}" if isinstance(error, (IndexError, KeyError)) else error
        raise _unreadable(path, reason) from None
    return value


def open_state_dict(path: pathlib.Path, tensors: Mapping[str | int, Tensor]) -> dict[str, StoredTensor]:
    """Returns a source of the tensors of a state dict, which is part of the result of `read_pickle`.

    Reading a tensor from a damaged storage raises UserError.

    Raises:
      UserError: values other than tensors, or a storage is missing or too small.
    """
    file, opened, total = MappedFile(path), {}, 0
    crc_of = functools.cache(functools.partial(_crc, file))  # members are verified on first use

    def checked(member: _Member, key: str, read: Callable[[], np.ndarray]) -> np.ndarray:
        value = read()
        if value.size and member.crc is not None and member.crc != crc_of(member):
            raise _unreadable(path, f"damaged at {key} (CRC)")
        return value

    with _members(path) as (_, base, members):
        for key, tensor in tensors.items():
            what = f"{path}: {key} is a {type(tensor).__name__}"
            require(isinstance(tensor, Tensor), what, None, "a tensor", "pass a state dict")
            storage = tensor.storage
            item = storage.dtype.itemsize
            member = members.get(f"{base}data/{storage.key}")
            if member is None or member.size < storage.size * item:
                raise _unreadable(path, f"the bytes of {key} are missing")
            total += math.prod(tensor.shape) * item
            info = TensorInfo(tensor.shape, storage.dtype)
            stored = file.tensor(info, member.offset + tensor.offset * item, tensor.strides, tensor.span * item)
            read = functools.partial(checked, member, str(key), stored.read)
            opened[str(key)] = dataclasses.replace(stored, read=read)
    if total > 8 * path.stat().st_size + 2**24 or len(opened) < len(tensors):
        raise _unreadable(path, f"{len(tensors)} tensors of {total:,} bytes, some of one name")
    return opened


def _crc(file: MappedFile, member: _Member) -> int:
    end, crc = member.offset + member.size, 0
    with memoryview(file.memory) as view:
        for start in range(member.offset, end, CRC_CHUNK):
            crc = zlib.crc32(view[start : min(end, start + CRC_CHUNK)], crc)
    return crc


class _Foreign(ValueError):
    """An imported name that belongs neither to tensors nor to containers."""


class _Interpreter:
    """Interprets the opcodes that torch.save writes, on a stack of plain values."""

    def __init__(self):
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # stacks below marks
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """Returns the unpickled value; raises ValueError, LookupError or TypeError for what torch.save never writes."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count >= MAX_OPCODES:
                raise ValueError(f"its pickle has more than {MAX_OPCODES:,} operations")
            self._step(opcode.name, argument)
        (value,) = self._stack
        return value

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "PROTO" if argument == 2:
                pass
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(name[-1])
                stack[-size:] = [(stack[-size], *stack[len(stack) - size + 1 :])]
            case "MARK":
                self._outer.append(stack)
                self._stack = []
            case "TUPLE":
                self._below_mark().append(tuple(stack))
            case "APPEND":
                item = stack.pop()
                _expect(stack[-1], list).append(item)
            case "APPENDS":
                _expect(self._below_mark()[-1], list).extend(stack)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(_expect(stack[-1], dict), [key, value])
            case "SETITEMS":
                _set_items(_expect(self._below_mark()[-1], dict), stack)
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                if argument not in CALLS | STORAGE_DTYPES | TENSOR_DTYPES:
                    raise _Foreign(argument.replace(" ", ".")[:200])
                stack.append(_Name(argument))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case "BUILD":  # attributes of a state dict, such as the versions of its modules
                _expect(stack.pop(), dict)
                _expect(stack[-1], dict)
            case "STOP":
                if self._outer:
                    raise ValueError("its pickle ends within a container")
            case _:
                name = f"protocol {argument}" if name == "PROTO" else name
                raise ValueError(f"{name} in its pickle, which torch.save does not write")

    def _below_mark(self) -> list[Any]:
        """Returns to the stack below the last mark."""
        self._stack = self._outer.pop()
        return self._stack


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} in its pickle where a {kind.__name__} belongs")
    return value


def _set_items(target: dict, items: list[Any]) -> None:
    if len(items) % 2:
        raise ValueError("a key without a value")
    for key, value in zip(items[::2], items[1::2]):
        if type(key) not in (str, int) or key in target:
            raise ValueError(f"a {type(key).__name__} as key, or a key that comes twice")
        target[key] = value


def _storage(identity: Any) -> Storage:
    kind, storage, key, _, size = _expect(identity, tuple)
    name = _expect(storage, _Name).name
    if kind != "storage" or name not in STORAGE_DTYPES:
        raise ValueError("a storage of an unknown kind")
    return Storage(_expect(key, str), STORAGE_DTYPES[name], _expect(size, int))


def _call(function: Any, arguments: Any) -> Any:
    name = _expect(function, _Name).name
    if len(_expect(arguments, tuple)) not in CALLS.get(name, ()):
        raise ValueError(f"{name} with {len(arguments)} arguments")
    match name:
        case "collections OrderedDict":
            return {}
        case "torch Size":
            return _expect(arguments[0], tuple)
        case "torch._utils _rebuild_parameter":
            return _expect(arguments[0], Tensor)
    storage, *place = arguments[:4]
    if name == "torch._utils _rebuild_tensor_v3":
        dtype = TENSOR_DTYPES.get(_expect(arguments[6], _Name).name)
        if dtype is None:
            raise ValueError(f"a tensor of {arguments[6].name}")
        storage = Storage(_expect(storage, Storage).key, dtype, storage.size // dtype.itemsize)
    return _tensor(_expect(storage, Storage), *place)


def _tensor(storage: Storage, offset: Any, shape: Any, strides: Any) -> Tensor:
    """Returns a tensor after checking that it is within its storage."""
    numbers = [offset, storage.size, *_expect(shape, tuple), *_expect(strides, tuple)]
    if any(type(number) is not int or not 0 <= number < 2**48 for number in numbers):
        raise ValueError("a tensor with other than whole numbers for shape and strides")
    if len(shape) != len(strides) or len(shape) > MAX_RANK:
        raise ValueError(f"a tensor of {len(shape)} dimensions with {len(strides)} strides")
    tensor = Tensor(storage, offset, shape, strides)
    if offset + tensor.span > storage.size:
        raise ValueError("a tensor that reaches beyond its storage")
    return tensor


def _check_plain(value: Any) -> None:
    """Raises ValueError for other than a tree of plain values, or for a tree that is too large or too deep."""
    items, characters, depth, level = 0, 0, 0, [value]
    while level:
        items, depth, below = items + len(level), depth + 1, []
        for each in level:
            if isinstance(each, (_Name, Storage)):
                raise ValueError("a name or storage that belongs to no tensor")
            if isinstance(each, str):
                characters += len(each)
            elif isinstance(each, dict):
                below += [*each.keys(), *each.values()]
            elif isinstance(each, (list, tuple)):
                below += each
            if items + len(below) > MAX_ITEMS or characters > MAX_PICKLE_BYTES or depth > MAX_DEPTH:
                raise ValueError(f"it has more than {MAX_ITEMS:,} values, or nests them deeper than {MAX_DEPTH}")
        level = below


@contextlib.contextmanager
def _members(path: pathlib.Path) -> Iterator[tuple[Any, str, dict[str, _Member]]]:
    """Yields the open file, the prefix of its members, and their positions.

    Raises:
      UserError: the file is missing, not a regular file, not an archive of torch.save, or damaged.
    """
    try:
        require(stat.S_ISREG(path.stat().st_mode), path, "not a regular file", "a torch.save file", "correct the path")
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            names = [info.filename for info in infos]
            found = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
            repeated = len(names) - len(set(names))
            what = f"{path}: {len(found)} members called data.pkl, {repeated} repeated"
            require(len(found) == 1 and not repeated, what, None, "one and none", "pass a torch.save file")
            checked = any(info.CRC for info in infos)  # torch writes 0 for all if checksums are disabled
            yield file, found[0].removesuffix("data.pkl"), {i.filename: _member(path, file, i, checked) for i in infos}
    except FileNotFoundError:
        raise UserError(f"{path}: missing", expected="a torch.save file", do="correct the path") from None
    except zipfile.BadZipFile:
        expected = "a complete file of torch.save (torch 1.6 or later)"
        do = "fetch it again, or load and save it once with torch"
        raise UserError(f"{path}: not a zip archive", expected=expected, do=do) from None
    except (OSError, NotImplementedError, UnicodeDecodeError, struct.error) as error:
        raise _unreadable(path, getattr(error, "strerror", None) or error) from None


def _member(path: pathlib.Path, file: Any, info: zipfile.ZipInfo, checked: bool) -> _Member:
    stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
    stored = stored and not info.flag_bits & 1  # encrypted
    require(stored, f"{path}: a compressed archive", None, "what torch.save writes", "save it again with torch")
    file.seek(info.header_offset)
    signature, *_, name, extra = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    offset = info.header_offset + LOCAL_HEADER.size + name + extra
    if signature != b"PK\3\4" or offset + info.file_size > path.stat().st_size:
        raise _unreadable(path, f"its member {info.filename} is not where its index says")
    return _Member(offset, info.file_size, info.CRC if checked else None)


def _contents(path: pathlib.Path, file: Any, members: Mapping[str, _Member], name: str, limit: int) -> bytes:
    member = members[name]
    if member.size > limit:
        raise _unreadable(path, f"{name} of {member.size:,} bytes")
    file.seek(member.offset)
    data = file.read(member.size)
    if member.crc not in (None, zlib.crc32(data)):
        raise _unreadable(path, f"damaged at {name} (CRC)")
    return data


def _unreadable(path: pathlib.Path, reason: object) -> UserError:
    return UserError(f"{path}: unreadable ({reason})", expected="a torch.save file", do="fetch it again")
