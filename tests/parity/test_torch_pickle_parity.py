"""Files of torch.save, read without torch."""

import collections
import os
import pathlib
import zipfile

import numpy as np
import pytest

from blip3o_jax.convert import torch_pickle
from blip3o_jax.convert.released import open_image_tokenizer
from blip3o_jax.errors import UserError

torch = pytest.importorskip("torch")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def state():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    return collections.OrderedDict(
        whole=base,
        transposed=base.T,
        window=base[1:4, ::2],
        parameter=torch.nn.Parameter(torch.randn(3, 5, generator=generator)),
        half=base.to(torch.float16),
        bfloat=base.to(torch.bfloat16),
        integers=torch.arange(7),
        flags=torch.tensor([True, False]),
        scalar=torch.tensor(1.5),
        empty=torch.zeros(0, 4),
        expanded=torch.ones(1, 3).expand(4, 3),
        float8=base.to(torch.float8_e4m3fn),
        unsigned=torch.arange(3).to(torch.uint16),
    )


def assert_same(source, tensors):
    assert set(source) == set(tensors)
    for key, tensor in tensors.items():
        tensor = tensor.detach()
        got = source[key].read()
        assert got.shape == tuple(tensor.shape)
        if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn):  # numpy has neither
            got, tensor = got.astype(np.float32), tensor.float()
        np.testing.assert_array_equal(got, tensor.numpy())
        source[key].release()


def test_tensors_come_back_with_their_strides_and_types(tmp_path):
    torch.save(state(), tmp_path / "x.pth")
    content = torch_pickle.read_pickle(tmp_path / "x.pth")
    assert type(content) is dict
    assert_same(torch_pickle.open_state_dict(tmp_path / "x.pth", content), state())


def test_a_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state(), tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(torch_pickle.open_state_dict(tmp_path / "x.pth", torch_pickle.read_pickle(tmp_path / "x.pth")), state())


def test_the_state_dict_of_a_module_is_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "x.pth")
    content = torch_pickle.read_pickle(tmp_path / "x.pth")
    assert_same(torch_pickle.open_state_dict(tmp_path / "x.pth", content), module.state_dict())


def test_an_image_tokenizer_comes_with_its_arguments(tmp_path):
    tensors = {"bottleneck.regularizer.embedding.weight": torch.randn(4, 3)}
    args = {"input_size": 31, "bottleneck": {"args": {"names": ["a", None, 1.5, (1, 2)]}}}
    torch.save({"model": {"args": args, "sd": tensors}}, tmp_path / "ta_tok.pth")
    source, read = open_image_tokenizer(tmp_path)
    assert read == args
    assert_same(source, tensors)


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, "x.pth")
    with pytest.raises(UserError, match=r"contains (posix|nt|os)\.mkdir - expected tensors and plain containers only"):
        torch_pickle.read_pickle(pathlib.Path("x.pth"))
    assert not pathlib.Path("pwned").exists()


def test_a_whole_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"contains torch\.nn"):
        torch_pickle.read_pickle(tmp_path / "x.pth")


def test_the_format_before_torch_1_6_is_named(tmp_path):
    torch.save(state(), tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="not a zip archive"):
        torch_pickle.read_pickle(tmp_path / "x.pth")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_file_that_was_cut_short_is_named(tmp_path, share):
    path = tmp_path / "x.pth"
    torch.save(state(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"x\.pth: not a zip archive"):
        torch_pickle.read_pickle(path)


@pytest.mark.parametrize("kept", [None, 15])
def test_a_missing_or_short_storage_is_named(tmp_path, kept):
    torch.save({"a": torch.ones(4), "b": torch.zeros(4)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as old, zipfile.ZipFile(tmp_path / "y.pth", "w") as new:
        for name in old.namelist():
            if not name.endswith("data/1"):
                new.writestr(name, old.read(name))
            elif kept is not None:
                new.writestr(name, old.read(name)[:kept])
    content = torch_pickle.read_pickle(tmp_path / "y.pth")
    with pytest.raises(UserError, match="the bytes of b are missing"):
        torch_pickle.open_state_dict(tmp_path / "y.pth", content)


def test_another_object_is_no_image_tokenizer(tmp_path):
    torch.save([1, 2], tmp_path / "ta_tok.pth")
    with pytest.raises(UserError, match="no image tokenizer in it"):
        open_image_tokenizer(tmp_path / "ta_tok.pth")
