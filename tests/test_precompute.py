"""Codes and latents made beforehand: the same loss as on pixels, files that continue, and what a user sees."""

import dataclasses
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("grain")

from blip3o_jax import experiment, precompute, treepath
from blip3o_jax.cli.data import main
from blip3o_jax.config import EditConfig
from blip3o_jax.config.presets import preset
from blip3o_jax.convert import native
from blip3o_jax.convert.checkpoint import open_checkpoint
from blip3o_jax.convert.random_weights import random_checkpoint
from blip3o_jax.data import builders, records
from blip3o_jax.data.config import DataConfig, Layout, SourceConfig
from blip3o_jax.data.example import BrokenItem, Example
from blip3o_jax.data.sources import open_source
from blip3o_jax.data.transforms import MakeRow
from blip3o_jax.errors import UserError
from blip3o_jax.objectives import joint
from blip3o_jax.text.tokenizer import Tokenizer
from blip3o_jax.train import step
from support.data_makers import picture

TASKS = ("t2i", "edit", "reconstruct")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    random_checkpoint(preset("tiny-edit"), path, seed=1)
    return str(path)


@pytest.fixture(scope="module")
def settings(checkpoint, golden_root):
    """An editing run on five pictures of each task."""
    options = {"size": 32, "count": 5}
    sources = {task: {"kind": "world", "path": "train", "task": task, "options": options} for task in TASKS}
    return {
        "objective": "joint",
        "settings": {"window": "span"},
        "trainable": (("", True),),
        "optimizer": {"learning_rate": 1e-3},
        "loop": {"num_steps": 2},
        "data": {"sources": sources, "batch_size": 6, "num_threads": 0, "prefetch": 1},
        "row": {"length": 200, "max_references": 1},
        "numerics": {"dtype": "float32", "frozen_dtype": "float32"},
        "init_from": checkpoint,
        "tokenizer": str(golden_root / "t2i" / "checkpoint"),
    }


@pytest.fixture(scope="module")
def made(settings, checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("precomputed") / "out"
    options = precompute.Options(batch_size=8, items_per_file=3)
    return precompute.precompute(settings, checkpoint, str(output), options)


def from_files(settings, made):
    sources = {name: {"kind": "arrayrecord", "path": str(made[name]), "task": name} for name in TASKS}
    row = settings["row"] | {"precomputed": True}
    return settings | {"data": settings["data"] | {"sources": sources}, "row": row}


def first_batch(settings):
    config = experiment.from_settings(settings)
    start = experiment.open_start(config)
    layout = experiment.row_layout(config, start.model)
    stream = experiment.open_stream(config.data, layout, Tokenizer.from_directory(start.tokenizer_dir), None)
    batch = stream.next()
    stream.close()
    return start, batch


def test_the_loss_on_precomputed_data_is_the_loss_on_pixels(settings, made):
    start, pixels = first_batch(settings)
    _, arrays = first_batch(from_files(settings, made))
    np.testing.assert_array_equal(pixels.tokens, arrays.tokens)
    assert pixels.ref_mask.any() and not pixels.ref_mask.all(), "rows with and without a reference"
    assert arrays.target_pixels is None and arrays.ref_pixels is None and arrays.ref_tokenizer_pixels is None
    params = start.opened.load_params(param_dtype="float32")
    keys = jax.random.split(step.step_key(0, 0, "loss"), len(pixels.tokens))
    loss = jax.jit(joint.make(start.model, joint.Settings()))
    expected, got = (loss(params, batch, keys)[0] for batch in (pixels, arrays))
    for name, term in expected.items():
        np.testing.assert_allclose(got[name].sum, term.sum, rtol=1e-6, err_msg=name)
        np.testing.assert_array_equal(got[name].weight, term.weight)


def test_a_record_holds_arrays_of_its_own_size_and_no_picture(made):
    edit = open_source(SourceConfig("arrayrecord", str(made["edit"]), "edit"))
    files = ["part-00000.array_record", "part-00001.array_record", "precompute.json"]
    assert len(edit) == 5 and sorted(os.listdir(made["edit"])) == files
    example = edit[0]
    assert example.target is None and not example.references and example.text
    shapes = {name: (array.shape, array.dtype.str) for name, array in example.arrays.items()}
    latent = ((4, 4, 32), "<f4")
    assert shapes == {
        "target_codes": ((16,), "<i4"),
        "ref_codes": ((1, 16), "<i4"),
        "target_latent": latent,
        "ref_latent": latent,
    }


def built(settings, made, tmp_path, checkpoint, mesh=None):
    """Opens a run on precomputed files, from a checkpoint."""
    settings = from_files(settings, made) | {
        "init_from": checkpoint,
        "trainable": ((r"^(dit|decoder)/", True), ("", False)),
    }
    settings |= {"mesh": mesh or {"data": 1}, "numerics": {"frozen_dtype": "bfloat16"}}
    config = experiment.from_settings(settings)
    devices = jax.devices()[: 1 if mesh is None else 2]
    experiment.build(config, settings, str(tmp_path / "run"), devices).source.close()


def changed(checkpoint, directory, part):
    """Writes the checkpoint with one other value in a parameter of `part`."""
    opened = open_checkpoint(checkpoint)
    leaves = treepath.flatten(opened.load_params(param_dtype="float32"))
    path = next(path for path in leaves if path.startswith(part))
    leaves[path] = leaves[path].at[(0,) * leaves[path].ndim].add(0.5)
    native.save_native(directory, opened.config, treepath.unflatten(leaves), opened.origin())
    return str(directory)


@pytest.mark.parametrize("part", ["autoencoder/encoder", "image_tokenizer/encoder", "image_tokenizer/quantizer"])
def test_files_of_other_encoders_are_not_trained_on(settings, checkpoint, made, tmp_path, part):
    other = changed(checkpoint, tmp_path / "other", part)
    with pytest.raises(UserError, match=f"edit: precomputed with another {part.partition('/')[0]}: got .* expected"):
        built(settings, made, tmp_path, other)


def test_files_of_another_latent_scale_are_not_trained_on(settings, checkpoint, made, tmp_path):
    opened = open_checkpoint(checkpoint)
    autoencoder = dataclasses.replace(opened.config.autoencoder, scaling_factor=0.5)
    other = dataclasses.replace(opened.config, autoencoder=autoencoder)
    native.save_native(tmp_path / "other", other, opened.load_params(), opened.origin())
    with pytest.raises(UserError, match="precomputed with another scaling_factor: got 0.41407 - expected 0.5"):
        built(settings, made, tmp_path, str(tmp_path / "other"))


def test_held_out_files_of_other_encoders_are_not_evaluated_on(settings, checkpoint, made, tmp_path):
    other = pathlib.Path(shutil.copytree(made["t2i"].parent, tmp_path / "other"))
    manifest = other / "t2i" / "precompute.json"
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(facts | {"encoders": facts["encoders"] | {"autoencoder": "0"}}))
    held_out = from_files(settings, {task: other / task for task in TASKS})["data"]
    with pytest.raises(UserError, match="other/t2i: precomputed with another autoencoder: got 0 - expected"):
        built(settings | {"validation": {"data": held_out}}, made, tmp_path, checkpoint)


@pytest.mark.parametrize("part", ["decoder/", "autoencoder/decoder"])
def test_files_serve_all_models_with_their_encoders_on_any_mesh(settings, checkpoint, made, tmp_path, capsys, part):
    built(settings, made, tmp_path, changed(checkpoint, tmp_path / "other", part), {"fsdp": 2})
    assert "encoders" not in capsys.readouterr().err


def test_a_source_that_is_precomputed_in_part_is_not_trained_on(settings, checkpoint, made, tmp_path):
    parts = {name: pathlib.Path(shutil.copytree(place, tmp_path / name)) for name, place in made.items()}
    (parts["edit"] / "part-00001.array_record").unlink()
    with pytest.raises(UserError, match="edit: precomputed in part: got 1 of 2 files - expected all of them"):
        built(settings, parts, tmp_path, checkpoint)


def test_files_without_a_record_of_their_encoders_are_named_once(settings, checkpoint, made, tmp_path, capsys):
    old = shutil.copytree(made["t2i"].parent, tmp_path / "old")
    for manifest in old.glob("*/precompute.json"):
        facts = json.loads(manifest.read_text())
        assert facts.pop("encoders")["scaling_factor"] > 0
        manifest.write_text(json.dumps(facts))
    built(settings, {task: old / task for task in TASKS}, tmp_path, checkpoint)
    told = [line for line in capsys.readouterr().err.splitlines() if "no record of the encoders" in line]
    assert len(told) == 1 and all(f"old/{task}" in told[0] for task in TASKS)


def test_only_missing_files_are_made_again_and_equal_the_first(settings, checkpoint, made, tmp_path):
    output = shutil.copytree(made["t2i"].parent, tmp_path / "out")
    missing, kept = (output / "edit" / f"part-0000{i}.array_record" for i in (0, 1))
    before, stamp = missing.read_bytes(), kept.stat().st_mtime_ns
    missing.unlink()
    (output / "edit" / ".part-00000.array_record.partial").mkdir()  # of a process that was killed
    precompute.precompute(settings, checkpoint, str(output), precompute.Options(batch_size=8, items_per_file=3))
    source = SourceConfig("arrayrecord", str(output / "edit"), "edit")
    again, first = open_source(source), open_source(SourceConfig("arrayrecord", str(made["edit"]), "edit"))
    for i in range(5):
        for name, array in first[i].arrays.items():
            np.testing.assert_array_equal(array, again[i].arrays[name])
    assert before and kept.stat().st_mtime_ns == stamp
    assert not list((output / "edit").glob(".*"))


def test_files_made_otherwise_are_not_mixed(settings, checkpoint, made):
    options = precompute.Options(batch_size=8, items_per_file=3, latent_dtype="float16")
    with pytest.raises(UserError, match="latent_dtype: got float16 - expected float32"):
        precompute.precompute(settings, checkpoint, str(made["t2i"].parent), options)
    options, more = precompute.Options(batch_size=8, items_per_file=3), {"row": {"length": 200, "max_references": 2}}
    with pytest.raises(UserError, match="max_references: got 2 - expected 1"):  # items with two were left out
        precompute.precompute(settings | more, checkpoint, str(made["t2i"].parent), options)


def test_an_item_with_more_references_than_a_row_holds_is_left_out():
    model = dataclasses.replace(preset("tiny-edit"), image_size=32)
    layout = Layout(
        fields=joint.fields(model, 1, precomputed=False), height=32, width=32, tokenizer_size=27, max_references=1,
        num_image_tokens=model.num_image_tokens, tokens=model.tokens,
    )  # fmt: skip
    encoder = precompute.Encoder(model, {}, layout, precompute.Options(1), None)
    pixels = np.zeros((32, 32, 3), np.uint8)
    assert encoder.row(Example("edit", "words", pixels, (pixels,), "n"))
    for count in (0, 2):
        with pytest.raises(BrokenItem, match=f"{count} reference images, of which a row holds 1 to 1"):
            encoder.row(Example("edit", "words", pixels, (pixels,) * count, "n"))


@pytest.mark.parametrize(
    "changes, message",
    [({"options": {"text_key": "other"}}, "options"), ({"caption": "a thing"}, "caption: got a thing - expected None")],
)
def test_captions_of_other_settings_are_not_mixed(tmp_path, changes, message):
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("words")
    config = SourceConfig("folder", str(tmp_path))
    copy(config, tmp_path / "out")
    with pytest.raises(UserError, match=message):
        copy(dataclasses.replace(config, **changes), tmp_path / "out")


def test_a_source_without_text_needs_no_captions(settings, checkpoint, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    source = {"kind": "folder", "path": str(tmp_path), "without_text": True}
    settings = settings | {"data": settings["data"] | {"sources": {"plain": source}}}
    made = precompute.precompute(settings, checkpoint, str(tmp_path / "out"), precompute.Options(batch_size=8))
    again = SourceConfig("arrayrecord", str(made["plain"]), without_text=True)
    assert open_source(again)[0].text == "" and not (made["plain"] / "quarantine.jsonl").exists()


def test_the_command_shares_files_among_workers_and_leaves_broken_items_out(settings, checkpoint, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    world = open_source(SourceConfig("world", "train", options={"size": 32, "count": 3}))
    for i in range(3):
        Image.fromarray(world[i].target).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(world[i].text)
    (pictures / "1.png").write_bytes(b"cut short")
    plain = json.loads(json.dumps(settings))
    plain["data"]["sources"] = {"mine": {"kind": "folder", "path": None}}
    plain["data"]["max_broken_share"] = 0.5
    (tmp_path / "run.json").write_text(json.dumps(plain))
    for worker in ("0/2", "1/2"):
        main(
            ["precompute", "--config", str(tmp_path / "run.json"), "--checkpoint", checkpoint, "--worker", worker]
            + ["--output", str(tmp_path / "out"), "--items_per_file", "2", "--batch_size", "8"]
            + [f"--config.data.sources.mine.path={pictures}"]
        )
        files = len(list((tmp_path / "out" / "mine").glob("*.array_record")))
        assert files == (1 if worker == "0/2" else 2)
    again = open_source(SourceConfig("arrayrecord", str(tmp_path / "out" / "mine")))
    assert len(again) == 2 and not again.skipped, "the files beside the records are known"
    assert "cut short" not in capsys.readouterr().err
    assert (tmp_path / "out" / "mine" / "quarantine.jsonl").exists()


class Copier:
    """In place of an encoder: arrays of nothing."""

    batch_size = 2

    def row(self, example):
        return {"pixels": builders.image_bytes(example.target, example.name)}

    def dispatch(self, examples, rows):
        return lambda: [dataclasses.replace(example, target=None) for example in examples]


def copy(config, out):
    options, data = precompute.Options(batch_size=2, items_per_file=3), DataConfig((config,), 2)
    precompute._precompute_source(config, open_source(config), out, Copier(), options, {}, data)


def test_a_small_source_that_is_mostly_broken_fails_again_when_it_is_continued(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(b"cut short")
        (tmp_path / f"{i}.txt").write_text("words")
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    for _ in range(2):
        with pytest.raises(UserError, match="5 of 6 items read are broken, the last 5.png"):
            copy(SourceConfig("folder", str(tmp_path)), tmp_path / "out")
        assert (tmp_path / "out" / "part-00000.array_record").exists()


def test_a_reconstruction_keeps_the_picture_whose_features_the_decoder_takes():
    model = dataclasses.replace(preset("tiny"), image_size=32, edit=EditConfig(siglip_features=True))
    codes, latent = np.zeros((1, 2, model.num_image_tokens), np.int32), np.zeros((1, 4, 4, 32), np.float32)
    layout = Layout(
        fields=joint.fields(model, 1, precomputed=False), height=32, width=32, tokenizer_size=27, max_references=1,
        num_image_tokens=model.num_image_tokens, tokens=model.tokens,
    )  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)
    example = Example("reconstruct", None, pixels, (), "n")
    encoder = precompute.Encoder(model, {}, layout, precompute.Options(1), None)
    stored = encoder._finished(example, 0, 0, codes, latent, None)
    arrays = dataclasses.replace(layout, fields=joint.fields(model, 1, precomputed=True), latent_shape=(4, 4, 32))
    row = MakeRow(arrays, None)(records.decode(records.encode(stored)))
    np.testing.assert_array_equal(row["ref_tokenizer_pixels"], MakeRow(layout, None)(example)["ref_tokenizer_pixels"])


@pytest.mark.parametrize("changes", [{"objective": "tokenizer"}, {"objective": None}])
def test_a_stage_that_needs_pictures_is_refused(settings, checkpoint, tmp_path, changes):
    settings = {name: value for name, value in {**settings, **changes}.items() if value is not None}
    with pytest.raises(UserError, match="expected joint"):
        precompute.precompute(settings, checkpoint, str(tmp_path), precompute.Options())


@pytest.mark.parametrize(
    ("flag", "value"), [("--batch_size", "0"), ("--latent_dtype", "int8"), ("--worker", "2/2"), ("--worker", "1")]
)
def test_impossible_options_are_told(refusal, flag, value):
    words = ["precompute", "--config=tiny", "--checkpoint=x", "--output=y", flag, value]
    assert flag in refusal(main, words)


def test_a_record_has_the_codes_of_its_own_references_alone():
    layout = Layout(("target_pixels",), 8, 8, 8, 4, preset("tiny-edit").tokens, max_references=3)
    encoder = precompute.Encoder(preset("tiny-edit"), {}, layout, precompute.Options(latent_dtype="float16"), None)
    codes, latent = np.arange(2 * 4 * 4).reshape(2, 4, 4), np.ones((2, 2, 2, 3), np.float32)
    example = Example("edit", "red", picture(0), (picture(1), picture(2)))
    arrays = encoder._finished(example, 1, 2, codes, latent, 2 * latent).arrays
    np.testing.assert_array_equal(arrays["target_codes"], codes[1, 0])
    np.testing.assert_array_equal(arrays["ref_codes"], codes[1, 1:3])
    assert {arrays[name].dtype for name in ("target_latent", "ref_latent")} == {np.dtype(np.float16)}
    assert (arrays["target_latent"] == 1).all() and (arrays["ref_latent"] == 2).all()
