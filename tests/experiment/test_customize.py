"""One's own images: parts of a folder, captions, the configuration that follows from them, the sheet that grows."""

import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("grain")

from blip3o_jax import experiment, monitor
from blip3o_jax.cli import configuration
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.sources import open_source
from blip3o_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]


def folder(directory, count=20, captions=True):
    directory.mkdir()
    for number in range(count):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(directory / f"{number:02d}.png")
        if captions:
            (directory / f"{number:02d}.txt").write_text(f"image {number}")
    return directory


def texts(path, part, caption=None):
    source = open_source(SourceConfig("folder", str(path), part=part, caption=caption))
    return [source[index].text for index in range(len(source))]


def test_every_tenth_image_is_held_out(tmp_path):
    path = folder(tmp_path / "images")
    train, held_out = texts(path, "train"), texts(path, "held_out")
    assert held_out == ["image 9", "image 19"] and len(train) == 18
    assert sorted(train + held_out) == sorted(texts(path, "all"))


@pytest.mark.parametrize("count", [2, 3, 9])
def test_of_fewer_than_ten_images_the_last_is_held_out(tmp_path, count):
    path = folder(tmp_path / "images", count)
    assert texts(path, "held_out") == [f"image {count - 1}"] and len(texts(path, "train")) == count - 1


def test_an_image_with_two_captions_is_in_one_part(tmp_path):
    path = folder(tmp_path / "images", 10, captions=False)
    rows = [{"file_name": f"{n:02d}.png", "text": f"{word} {n}"} for word in ("first", "second") for n in range(10)]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert texts(path, "held_out") == ["first 9", "second 9"] and len(texts(path, "train")) == 18


def test_a_caption_is_for_images_without_one(tmp_path):
    path = folder(tmp_path / "images", 3)
    (path / "01.txt").unlink()
    (path / "02.txt").write_text("  ")
    assert texts(path, "all", "a dog") == ["image 0", "a dog", "a dog"]


def read(path, *changes):
    return configuration.read("configs/customize.py", [f"data.path={path}", *changes])


def test_a_folder_becomes_sources_and_previews(tmp_path):
    path = folder(tmp_path / "images")
    config = experiment.from_settings(read(path, "adapter.rank=4"))
    assert config.adapter.rank == 4 and config.adapter.enabled
    assert [source.part for source in config.data.sources] == ["train"]
    assert [source.part for source in config.validation.data.sources] == ["held_out"]
    assert config.samples.prompts == ("image 9", "image 19")
    named = experiment.from_settings(read(folder(tmp_path / "bare", captions=False), "data.subject=a dog"))
    assert named.samples.prompts == ("a dog",) and named.data.sources[0].caption == "a dog"


@pytest.mark.parametrize("file", ["configs/customize.py", "docs/customize.md"])
def test_the_flags_for_other_base_models_are_accepted(tmp_path, file):
    _, _, rest = (ROOT / file).read_text().partition("--config.init_from=CHECKPOINT")
    changes = re.findall(r"--config\.(\S+)", re.split('\n\n|"""', rest)[0])
    assert len(changes) >= 5
    experiment.from_settings(read(folder(tmp_path / "images"), *changes))


def test_captions_that_hardly_fit_are_not_drawn(tmp_path):
    path = folder(tmp_path / "images")
    (path / "09.txt").write_text("very " * 100)
    assert read(path)["samples"]["prompts"] == ("image 19",)
    (path / "19.txt").write_text("long " * 100)
    assert read(path)["samples"]["prompts"] == tuple(f"image {number}" for number in range(8))


def test_other_kinds_of_data_are_read_as_a_folder_is(tmp_path):
    folder(tmp_path / "images")
    rows = [{"image": f"images/{i}.png", "caption": f"row {i}"} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = experiment.from_settings(read(tmp_path / "rows.jsonl", "data.kind=jsonl"))
    assert [source.kind for source in (*config.data.sources, *config.validation.data.sources)] == ["jsonl", "jsonl"]
    assert config.samples.prompts == ("row 9", "row 19")


def test_samples_that_the_model_is_to_keep_are_mixed_in(tmp_path):
    rows = [{"file": f"{i}.png", "prompt": f"star {i}", "negative_prompt": None, "image": []} for i in range(2)]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prior = (f"data.prior.path={tmp_path / 'samples.jsonl'}", "data.prior.weight=0.5")
    _, mixed = experiment.from_settings(read(folder(tmp_path / "images"), *prior)).data.sources
    assert mixed.weight == 0.5 and [example.text for example in open_source(mixed)] == ["star 0", "star 1"]
    with pytest.raises(UserError, match="data.prior.path: got none"):
        read(tmp_path / "images", "data.prior.kind=world")


def test_a_broken_image_does_not_stop_the_run(tmp_path):
    path = folder(tmp_path / "images")
    (path / "03.png").write_bytes(b"no image")
    assert experiment.from_settings(read(path)).data.max_broken_share >= 1 / 20


@pytest.mark.parametrize(
    ("count", "captions", "change", "message"),
    [(5, False, (), "data.path .*: no caption of any image .*data.subject=WORD"),
     (5, True, ("data.subject=",), "data.subject: got '' - expected a word"),
     (1, True, ("data.path=nowhere",), "nowhere: not a directory"),
     (0, True, (), "no images"), (1, True, (), "part held_out: got no image - expected at least one")],
)  # fmt: skip
def test_a_folder_that_cannot_be_learnt_from_is_refused(tmp_path, count, captions, change, message):
    with pytest.raises(UserError, match=message):
        read(folder(tmp_path / "images", count, captions), *change)


def test_without_a_folder_the_configuration_can_be_planned():
    assert configuration.read("customize")["data"]["sources"][0]["path"] is None


def test_sheets_are_joined_in_the_order_of_their_steps(tmp_path):
    for step in (100, 20, 3000):
        Image.fromarray(np.full((4, 6, 3), step % 251, np.uint8)).save(tmp_path / f"{step}.png")
    Image.new("RGB", (6, 99)).save(tmp_path / "progress.png")
    sheet = monitor._progress(tmp_path)
    assert sheet.shape == (12, 6, 3) and list(sheet[::4, 0, 0]) == [20, 100, 3000 % 251]
