"""Our own layout: restoring on any mesh, damaged files, nothing half-written, the hub, the command line."""

import dataclasses
import json
import pathlib
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from blip3o_jax import checksums
from blip3o_jax.cli import convert as command
from blip3o_jax.config import MeanFlowConfig, schema
from blip3o_jax.config.presets import preset
from blip3o_jax.convert import checkpoint, native
from blip3o_jax.convert.checkpoint import import_checkpoint, open_checkpoint
from blip3o_jax.convert.export import export_checkpoint
from blip3o_jax.convert.random_weights import random_checkpoint
from blip3o_jax.errors import UserError
from blip3o_jax.models.blip3o import abstract_params
from blip3o_jax.sharding import make_mesh
from blip3o_jax.treepath import flatten, unflatten


@pytest.fixture
def copy(folder, tmp_path):
    """A native checkpoint that a test may break."""
    return shutil.copytree(folder / "native", tmp_path / "native")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A released checkpoint and its import."""
    folder = tmp_path_factory.mktemp("checkpoints")
    random_checkpoint(preset("tiny"), folder / "released", seed=2)
    import_checkpoint(open_checkpoint(folder / "released"), folder / "native")
    return folder


def fresh(config):
    """Float32 parameters of some values."""
    shapes = flatten(meta.unbox(abstract_params(config)))
    return unflatten({path: np.full(leaf.shape, i, np.float32) for i, (path, leaf) in enumerate(shapes.items())})


@pytest.mark.parametrize("mesh", [None, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("param_dtype", [None, "float32"])
def test_an_import_loads_as_its_source_on_any_mesh(folder, mesh, param_dtype):
    mesh = mesh and make_mesh(mesh)
    expected = flatten(open_checkpoint(folder / "released").load_params(mesh, param_dtype))
    got = flatten(open_checkpoint(folder / "native").load_params(mesh, param_dtype))
    assert set(got) == set(expected)
    for path, leaf in got.items():
        assert leaf.dtype == expected[path].dtype and leaf.sharding == expected[path].sharding, path
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_single_parts_load_alone(folder):
    for name in ("native", "released"):
        checkpoint = open_checkpoint(folder / name)
        assert set(checkpoint.load_params(parts=["connector", "dit"])) == {"connector", "dit"}
        with pytest.raises(UserError, match="parts: got conector - expected some of"):
            checkpoint.load_params(parts=["conector"])


def test_parameters_sharded_over_devices_are_saved_whole(folder, tmp_path):
    source, mesh = open_checkpoint(folder / "released"), make_mesh({"fsdp": 2}, jax.devices()[:2])
    native.save_native(tmp_path / "saved", source.config, source.load_params(mesh), source.origin())
    expected = flatten(source.load_params())
    for path, leaf in flatten(open_checkpoint(tmp_path / "saved").load_params()).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def exported(folder, config, params, origin=None, **options):
    """Saves a model, exports it and opens the export, whose configuration is equal."""
    native.save_native(folder / "saved", config, params, origin)
    export_checkpoint(open_checkpoint(folder / "saved"), folder / "released", **options)
    opened = open_checkpoint(folder / "released")
    assert opened.config == config
    return opened


def test_trained_parameters_are_exported_in_the_types_of_their_source(folder, tmp_path):
    source = open_checkpoint(folder / "native")
    params = flatten(source.load_params(param_dtype="float32"))
    params["connector/hidden/bias"] = jnp.full_like(params["connector/hidden/bias"], 0.75)
    made = exported(tmp_path, source.config, unflatten(params), source.origin())
    assert {str(value.dtype) for value in made.source.values()} == {"bfloat16"}
    assert (made.load_params(parts=["connector"])["connector"]["hidden"]["bias"] == 0.75).all()


def test_a_model_from_scratch_is_exported_with_its_configuration(tmp_path):
    defaults = {"token_guidance_scale": 2.0, "edit_token_guidance_scale": 1.5, "num_inference_steps": 8}
    config = dataclasses.replace(preset("tiny-edit"), **defaults, guidance_scale=1.0)
    params = jax.tree.map(lambda leaf: leaf + np.float32(0.1), fresh(config))
    made = exported(tmp_path, config, params, dtype="bfloat16", shard_bytes=10**6)
    assert made.identity == open_checkpoint(tmp_path / "saved").identity, "rounding to bfloat16 does not change it"
    assert (tmp_path / "released" / "model.safetensors.index.json").exists()
    assert {str(leaf.dtype) for leaf in flatten(made.load_params()).values()} == {"bfloat16"}


def test_a_distilled_model_is_exported_with_all_that_it_was_distilled_to(tmp_path):
    plain = preset("tiny")
    config = dataclasses.replace(plain, dit=dataclasses.replace(plain.dit, mean_flow=MeanFlowConfig(2, 3.0)))
    made = exported(tmp_path, config, fresh(config), dtype="float32")
    loaded, expected = flatten(made.load_params()), flatten(fresh(config))
    assert loaded.keys() == expected.keys()
    assert all((loaded[path] == expected[path]).all() for path in loaded)


def test_a_tower_without_layers_keeps_its_configuration(tmp_path):
    config = preset("tiny")
    encoder = dataclasses.replace(config.image_tokenizer.encoder, depth=0)
    config = dataclasses.replace(config, image_tokenizer=dataclasses.replace(config.image_tokenizer, encoder=encoder))
    loaded = exported(tmp_path, config, fresh(config), dtype="bfloat16").load_params()
    assert not any("layers" in path for path in flatten(loaded["image_tokenizer"]["encoder"]))
    file = tmp_path / "released" / "siglip_config.json"
    settings = json.loads(file.read_text())
    for name in ("image_size", "intermediate_size"):
        tower = {key: value for key, value in settings["vision_config"].items() if key != name}
        file.write_text(json.dumps({"vision_config": tower}))
        with pytest.raises(UserError, match=f"siglip_config.json: no {name} - expected this field for a tower without"):
            open_checkpoint(tmp_path / "released")


def test_a_changed_configuration_changes_the_files_that_say_otherwise(folder, tmp_path):
    source, config = open_checkpoint(folder / "native"), preset("tiny-edit")
    params = {**fresh(config), **source.load_params(param_dtype="float32")}
    assert set(open_checkpoint(folder / "released").source) < set(
        exported(tmp_path, config, params, source.origin()).source
    )


def test_numerics_are_no_reason_to_rewrite_a_configuration(copy, tmp_path):
    file = copy / "released" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text())))  # in one line
    source = open_checkpoint(copy)
    config = schema.with_dtype(source.config, dtype="bfloat16", param_dtype="float32", remat="full", unroll=True)
    native.save_native(tmp_path / "saved", config, source.load_params(), source.origin())
    export_checkpoint(open_checkpoint(tmp_path / "saved"), tmp_path / "exported")
    assert (tmp_path / "exported" / "config.json").read_text() == file.read_text()


def test_nothing_is_overwritten_or_left_half_written(folder, tmp_path, monkeypatch):
    source = open_checkpoint(folder / "released")
    with pytest.raises(UserError, match="exists already"):
        import_checkpoint(source, folder / "native")

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(native.Origin, "copy_files", fail)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(source, tmp_path / "native")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file/model", "native", "."])
def test_a_place_that_cannot_be_written_is_told_before_weights_are_read(folder, tmp_path, monkeypatch, place):
    (tmp_path / "file").touch()
    (tmp_path / "native" / "something").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(checkpoint.engine, "load", lambda *_, **__: pytest.fail("read weights"))
    target = pathlib.Path(place) if place == "." else tmp_path / place
    with pytest.raises(UserError, match=r"can be written|exists already|not the name of a directory"):
        import_checkpoint(open_checkpoint(folder / "released"), target)


def test_a_full_disk_is_noticed_before_writing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="free space: got .* MB"):
        import_checkpoint(open_checkpoint(folder / "released"), tmp_path / "native")
    with pytest.raises(UserError, match="free space: got .* MB"):
        random_checkpoint(preset("tiny"), tmp_path / "random")
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoints_are_named(copy):
    text = (copy / native.META).read_text()
    (copy / native.META).write_text(text.replace('"mlp_dim": 112', '"mlp_dim": 128', 1))
    with pytest.raises(UserError, match=r"3 parameters do not fit.*mlp/down/kernel got \[3, 112, 64\]"):
        open_checkpoint(copy).load_params()
    (copy / native.META).write_text(text)
    (copy / "params" / "manifest.ocdbt").unlink()
    with pytest.raises(UserError, match="damaged: got params/manifest.ocdbt missing"):
        open_checkpoint(copy).load_params()
    (copy / checksums.NAME).unlink()
    with pytest.raises(UserError, match="params.*expected a complete checkpoint"):
        open_checkpoint(copy).load_params()
    shutil.rmtree(copy / "params")
    with pytest.raises(UserError, match="params: got nothing"):
        open_checkpoint(copy).load_params()
    values = json.loads((copy / native.META).read_text())
    (copy / native.META).write_text(json.dumps({**values, "format": 99}))
    with pytest.raises(UserError, match="format 99 .* install a blip3o_jax that is as new"):
        open_checkpoint(copy)


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_is_found_wherever_it_is(copy, bit):
    rng = np.random.default_rng(bit)
    files = [file for file in sorted((copy / "params").rglob("*")) if file.is_file() and file.stat().st_size]
    file = [*files, copy / "unused.safetensors"][int(rng.integers(len(files) + 1))]
    content = bytearray(file.read_bytes())
    content[int(rng.integers(len(content)))] ^= 1 << bit
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"damaged: got {file.relative_to(copy)} changed - expected the files"):
        checkpoint = open_checkpoint(copy)
        checkpoint.load_params(parts=["connector"])
        checkpoint.origin()


def test_a_checkpoint_of_an_earlier_version_has_no_checksums(copy):
    (copy / checksums.NAME).unlink()
    open_checkpoint(copy).load_params(parts=["connector"])
    assert open_checkpoint(copy).origin().unused


@pytest.mark.parametrize("text", ["[]", "{", '{"../a": [1, 2]}', '{"params/d": 3}'])
def test_checksums_that_are_none_are_refused(copy, text):
    (copy / checksums.NAME).write_text(text)
    with pytest.raises(UserError, match=checksums.NAME + "|damaged"):
        open_checkpoint(copy).load_params(parts=["connector"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "no id - expected this field"),
        ({"id": "x"}, "no config"),
        ({"id": "x", "config": []}, "config: got .. - expected"),
    ],
)
def test_a_description_that_lacks_something_is_named(tmp_path, values, words):
    (tmp_path / native.META).write_text(json.dumps({"format": native.FORMAT, **values}))
    with pytest.raises(UserError, match=f"{native.META}.*{words}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dtypes": {"a.weight": "int3"}}, f"{native.META}.dtypes.a.weight: got 'int3' - expected F64"),
        ({"dtypes": {"a.weight": ["BF16"]}}, "dtypes.a.weight: got"),
        ({"unused": {"b.weight": "a reason"}}, "unused.safetensors: no b.weight - expected all"),
    ],
)
def test_a_description_that_does_not_fit_its_files_is_named(copy, values, words):
    meta = json.loads((copy / native.META).read_text())
    (copy / native.META).write_text(json.dumps(meta | values))
    with pytest.raises(UserError, match=words):
        open_checkpoint(copy).origin()


def test_nan_parameters_are_named(folder, tmp_path):
    source = open_checkpoint(folder / "native")
    params = flatten(source.load_params())
    params["connector/norm/scale"] = params["connector/norm/scale"].at[3].set(jnp.nan)
    native.save_native(tmp_path / "native", source.config, unflatten(params), source.origin())
    with pytest.raises(UserError, match="1 values of connector/norm/scale are NaN"):
        open_checkpoint(tmp_path / "native").load_params(make_mesh())
    open_checkpoint(tmp_path / "native").load_params(check_finite=False)


def test_hub_addresses_are_fetched_through_huggingface_hub(folder, monkeypatch):
    calls = []

    def snapshot_download(repo, revision, allow_patterns):
        calls.append((repo, revision))
        return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert open_checkpoint("hf://org/some.name@main/released").config == preset("tiny")
    assert calls == [("org/some.name", "main")]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("offline\nand more"), "OSError: offline"),
        (type("LocalEntryNotFoundError", (OSError,), {})("Cannot find"), "not in the local cache, and the hub"),
    ],
)
def test_hub_failures_are_one_line(monkeypatch, error, reason):
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    with pytest.raises(UserError, match=f"hf://org/name: {reason}.* - expected a repository"):
        open_checkpoint("hf://org/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install blip3o_jax\[hub\]"):
        open_checkpoint("hf://org/name")


def test_the_command_line_converts_there_and_back_with_a_report(tmp_path, capsys, refusal):
    command.main(["random", "tiny", str(tmp_path / "a"), "--shard_gb", "0.0005"])
    command.main(["import", str(tmp_path / "a"), str(tmp_path / "b")])
    output = capsys.readouterr().out
    assert "decoder                 35         145,296  bfloat16" in output
    assert "16 tensors, 17,408 elements: the tokenizer reads the hidden state before the tower's last layer" in output
    assert "300 of 300 tensors accounted for" in output and "check the licences" in output
    command.main(["export", str(tmp_path / "b"), str(tmp_path / "c")])
    assert "in the released layout already" in refusal(command.main, ["export", tmp_path / "a", tmp_path / "d"])
    assert "does not exist" in refusal(command.main, ["import", "nowhere", tmp_path / "d"])
