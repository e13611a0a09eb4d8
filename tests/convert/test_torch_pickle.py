"""The reader of torch.save files, on files that are put together here; tests/parity has those of torch itself."""

import dataclasses
import struct
import zipfile

import numpy as np
import pytest

from blip3o_jax.convert import torch_pickle
from blip3o_jax.convert.torch_pickle import open_state_dict, read_pickle
from blip3o_jax.errors import UserError


@dataclasses.dataclass
class Stored:
    """A tensor to be written: arguments of `_rebuild_tensor_v2` and the size of its storage."""

    key: str
    shape: tuple
    strides: tuple
    size: object
    offset: object = 0
    kind: str = "FloatStorage"


@dataclasses.dataclass
class Raw:
    """Opcodes as they are."""

    code: bytes


def name(module, attribute):
    return b"c" + f"{module}\n{attribute}\n".encode()


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def code(value):
    """Opcodes of protocol 2 that build a value."""
    if isinstance(value, Raw):
        return value.code
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value) if abs(value) < 2**31 else b"\x8a\x08" + struct.pack("<q", value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return text(value)
    if isinstance(value, tuple):
        return b"(" + b"".join(map(code, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(code, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(code(key) + code(item) for key, item in value.items()) + b"u"
    storage = code(("storage", Raw(name("torch", value.kind)), value.key, "cpu", value.size)) + b"Q"
    hooks = Raw(name("collections", "OrderedDict") + b")R")
    arguments = (Raw(storage), value.offset, value.shape, value.strides, False, hooks)
    return name("torch._utils", "_rebuild_tensor_v2") + code(arguments) + b"R"


def write(path, value, storages=None, compression=zipfile.ZIP_STORED):
    """A file as torch.save lays it out; returns its path."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/data.pkl", value if isinstance(value, bytes) else b"\x80\x02" + code(value) + b".")
        archive.writestr("x/byteorder", "little")
        for key, data in (storages or {}).items():
            archive.writestr(f"x/data/{key}", data)
    return path


NUMBERS = np.arange(12, dtype=np.float32)
WHOLE = Stored("0", (3, 4), (4, 1), 12)
STORAGES = {"0": NUMBERS.tobytes()}


def test_containers_come_back_plain(tmp_path):
    value = {"a": [1, -2, 2**40, 1.5], "b": ((), (1,), (1, "two", None)), 3: {"deep": [True, False, []]}}
    assert read_pickle(write(tmp_path / "x.pth", value)) == value


def test_names_lead_to_plain_values(tmp_path):
    size = Raw(name("torch", "Size") + code((2, 3)) + b"\x85R")
    parameter = Raw(name("torch._utils", "_rebuild_parameter") + code((WHOLE, True, {})) + b"R")
    with_versions = Raw(name("collections", "OrderedDict") + b")R" + code("w") + code(WHOLE) + b"s" + b"}b")
    value = read_pickle(write(tmp_path / "x.pth", [size, parameter, with_versions], STORAGES))
    assert value[0] == (2, 3)
    assert value[1] == value[2]["w"] and value[1].shape == (3, 4)


def test_views_share_a_storage(tmp_path):
    tensors = {
        "whole": WHOLE,
        "tied": WHOLE,
        "transposed": Stored("0", (4, 3), (1, 4), 12),
        "window": Stored("0", (2, 2), (4, 2), 12, offset=5),
        "expanded": Stored("0", (5, 2), (0, 1), 12),
        "empty": Stored("0", (0, 7), (7, 1), 12),
        "scalar": Stored("0", (), (), 12, offset=11),
    }
    path = write(tmp_path / "x.pth", tensors, STORAGES)
    source = open_state_dict(path, read_pickle(path))
    whole = NUMBERS.reshape(3, 4)
    expected = {"whole": whole, "tied": whole, "transposed": whole.T, "window": whole[1:3, 1::2],
                "expanded": np.broadcast_to(whole[0, :2], (5, 2)), "empty": np.zeros((0, 7)), "scalar": 11}  # fmt: skip
    for key, array in expected.items():
        np.testing.assert_array_equal(source[key].read(), array)


@pytest.mark.parametrize("kind, dtype", sorted(torch_pickle.STORAGE_DTYPES.items()))
def test_every_storage_has_its_type(tmp_path, kind, dtype):
    if kind.startswith("torch "):
        tensor = Stored("0", (2,), (1,), 2, kind=kind.split()[1])
        path = write(tmp_path / "x.pth", {"a": tensor}, {"0": np.ones(2, dtype).tobytes()})
        np.testing.assert_array_equal(open_state_dict(path, read_pickle(path))["a"].read(), np.ones(2, dtype))


SHARED = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(25))  # pairs of the one before, twice
REFUSED = [
    (b"\x80\x02]" + SHARED + b".", "more than 1,048,576 values"),
    (b"", "not a zip|unreadable"),
    (b"\x80\x04N.", "protocol 4"),
    (b"\x80\x02(lp0\n.", "LIST in its pickle"),
    (b"\x80\x02cbuiltins\nlen\n.", "contains builtins.len - expected tensors and plain containers only"),
    (b"\x80\x02c__builtin__\nset\n.", "contains __builtin__.set"),
    (b"\x80\x02ctorch\nFloatStorage\n.", "belongs to no tensor"),
    (b"\x80\x02ctorch\nFloatStorage\n}b.", "where a dict belongs"),
    (b"\x80\x02]}b.", "where a dict belongs"),
    (b"\x80\x02NN.", "unpack"),
    (b"\x80\x02(N.", "within a container"),
    (b"\x80\x02h\x05.", "refers to nothing"),
    (b"\x80\x02a.", "refers to nothing"),
    (b"\x80\x02X\xff\xff\xff\x7fa.", "unreadable"),
    (b"\x80\x02}(NNu.", "NoneType as key"),
    (b"\x80\x02}(K\x01NK\x01Nu.", "comes twice"),
    (b"\x80\x02}(K\x01u.", "key without a value"),
    (b"\x80\x02}", "unreadable"),
    (b"\x80\x02]q\x00h\x00a.", "nests them deeper"),
    (b"\x80\x02" + b"]" * 40 + b"a" * 39 + b".", "nests them deeper"),
    (b"\x80\x02" + b"N" * 2**20 + b".", "more than 1,048,576 operations"),
    (b"\x80\x02" + b"N" * 2**25 + b".", "data.pkl of"),
    (Stored("0", (4, 4), (4, 1), 12), "beyond its storage"),
    (Stored("0", (3, 4), (4, 1), 12, offset=1), "beyond its storage"),
    (Stored("0", (3, 4), (4, 1), 12, offset=-1), "whole numbers"),
    (Stored("0", (3, 4), (-4, 1), 12), "whole numbers"),
    (Stored("0", (3, 4.0), (4, 1), 12), "whole numbers"),
    (Stored("0", (3, True), (4, 1), 12), "whole numbers"),
    (Stored("0", (2**31, 2**31, 4), (0, 0, 1), 2**62), "whole numbers"),
    (Stored("0", (3, 4), (4,), 12), "2 dimensions with 1 strides"),
    (Stored("0", (1,) * 17, (1,) * 17, 12), "17 dimensions"),
    (Stored("0", (3, 4), (4, 1), "12"), "where a int belongs"),
    (Stored("0", (3, 4), (4, 1), 12, kind="Size"), "unknown kind"),
]


@pytest.mark.parametrize("value, message", REFUSED)
def test_what_torch_does_not_write_is_refused(tmp_path, value, message):
    with pytest.raises(UserError, match=message) as error:
        read_pickle(write(tmp_path / "x.pth", value, STORAGES))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "value, storages, message",
    [
        (Stored("0", (2**24, 2**8), (0, 0), 12), STORAGES, "1 tensors of 17,179,869,184 bytes"),
        (WHOLE, {}, "the bytes of a are missing"),
        (WHOLE, {"0": bytes(47)}, "the bytes of a are missing"),
        (1, {}, "a is a int"),
    ],
)
def test_no_state_dict_is_made_of_other_than_whole_tensors(tmp_path, value, storages, message):
    path = write(tmp_path / "x.pth", {"a": value}, storages)
    with pytest.raises(UserError, match=message):
        open_state_dict(path, read_pickle(path))


@pytest.mark.parametrize("place", ["data.pkl", "0"])
def test_a_flipped_bit_is_found(tmp_path, place):
    path = write(tmp_path / "x.pth", {"name": WHOLE}, STORAGES)
    content = bytearray(path.read_bytes())
    needle = NUMBERS.tobytes()[8:] if place == "0" else b"name"
    content[content.index(needle)] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged at (name|x/data\.pkl) \(CRC\)"):
        open_state_dict(path, read_pickle(path))["name"].read()


@pytest.mark.parametrize("size", [0, 10, 200, None])
def test_a_compressed_archive_and_a_file_that_was_cut_short_are_named(tmp_path, size):
    method = zipfile.ZIP_DEFLATED if size is None else zipfile.ZIP_STORED
    path = write(tmp_path / "x.pth", {"a": WHOLE}, STORAGES, method)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="a compressed archive" if size is None else "not a zip archive"):
        read_pickle(path)


def test_a_directory_and_nothing_are_named(tmp_path):
    with pytest.raises(UserError, match="not a regular file"):
        read_pickle(tmp_path)
    with pytest.raises(UserError, match="missing"):
        read_pickle(tmp_path / "x.pth")


def test_members_that_come_twice_are_refused(tmp_path):
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        for _ in range(2):
            archive.writestr("x/data.pkl", b"\x80\x02N.")
    with pytest.raises(UserError, match="2 members called data.pkl"):
        read_pickle(tmp_path / "x.pth")
