"""Reading and writing safetensors files, and what is wrong with broken ones."""

import json

import ml_dtypes
import numpy as np
import pytest

from blip3o_jax.convert import safetensors_io, weight_files
from blip3o_jax.convert.sources import combined, in_memory
from blip3o_jax.errors import UserError


def tensors():
    generator = np.random.default_rng(0)
    return {
        "b.weight": generator.standard_normal((40, 30)).astype(ml_dtypes.bfloat16),
        "a.bias": generator.standard_normal(7).astype(np.float32),
        "c": np.arange(5, dtype=np.int64),
        "scalar": np.array(2.5, np.float16),
        "empty": np.zeros((0, 3), np.float32),
    }


def write(directory, values, **options):
    """Returns the files that are written, the index last."""
    safetensors_io.write_weights(directory, in_memory(values), **options)
    return sorted(directory.iterdir())


def assert_same(source, values):
    assert set(source) == set(values)
    for key, value in values.items():
        assert (source[key].shape, source[key].dtype) == (value.shape, value.dtype)
        assert source[key].read().tobytes() == value.tobytes()


def test_what_is_written_is_read_back(tmp_path):
    paths = write(tmp_path, tensors())
    assert [path.name for path in paths] == ["model.safetensors"]
    assert_same(weight_files.open_weights(tmp_path), tensors())


def test_the_safetensors_library_reads_what_is_written_and_the_other_way_round(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    write(tmp_path, tensors())
    read = numpy.load_file(tmp_path / "model.safetensors")
    assert {key: value.tobytes() for key, value in read.items()} == {k: v.tobytes() for k, v in tensors().items()}
    numpy.save_file(tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(weight_files.open_weights(tmp_path), tensors())


def test_large_checkpoints_are_split_and_indexed(tmp_path):
    paths = write(tmp_path, tensors(), shard_bytes=2000)
    assert [path.name for path in paths] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads(paths[-1].read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors().values())
    assert_same(weight_files.open_weights(tmp_path), tensors())


def test_views_survive_the_release_of_their_memory(tmp_path):
    write(tmp_path, tensors())
    source = weight_files.open_weights(tmp_path)
    view = source["b.weight"].read()
    source["b.weight"].release()
    np.testing.assert_array_equal(view.view(np.uint16), tensors()["b.weight"].view(np.uint16))


@pytest.mark.parametrize(
    "change",
    [
        *(lambda data, kept=kept: data[:kept] for kept in (0, 4, 100, 2000)),
        lambda _: b"version https://git-lfs",
        lambda data: data[:20] + b"\xc8" + data[21:],
    ],
)
def test_a_file_that_was_cut_short_or_is_of_another_format_is_named(tmp_path, change):
    path = write(tmp_path, tensors())[0]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(
        UserError, match=r"model\.safetensors: .* expected a complete safetensors file - fetch it again"
    ):
        weight_files.open_weights(tmp_path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda paths: paths[1].unlink(), r"1 of 2 weight files are missing \(model-00002-of-00002.safetensors\)"),
        (lambda paths: paths[0].write_bytes(paths[1].read_bytes()), "no tensor b.weight .* different checkpoints"),
        (lambda paths: paths[2].unlink(), "2 shards without model.safetensors.index.json"),
        (lambda paths: write(paths[0].parent, tensors()), "both model.safetensors and model.safetensors.index.json"),
        (lambda paths: [path.unlink() for path in paths], "no model.safetensors .* no weights"),
    ],
)
def test_files_that_do_not_belong_together_are_named(tmp_path, damage, words):
    damage(write(tmp_path, tensors(), shard_bytes=2000))
    with pytest.raises(UserError, match=words):
        weight_files.open_weights(tmp_path)


def test_a_tensor_in_two_sources_is_an_error(tmp_path):
    write(tmp_path, tensors())
    source = weight_files.open_weights(tmp_path)
    with pytest.raises(UserError, match="tensor b.weight: got it twice"):
        combined([("", source), ("", source)])
