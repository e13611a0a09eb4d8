"""The demo world on disk: layouts of real data, complete or not there."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.data.images import load_image
from blip3o_jax.demo.world import edits, export, prompts
from blip3o_jax.demo.world.render import render
from blip3o_jax.errors import UserError
from blip3o_jax.evals.sheet import captioned
from support.data_makers import opened


@pytest.mark.parametrize("layout, task", [("webdataset", "t2i"), ("jsonl", "edit"), ("folder", "t2i")])
def test_an_export_is_a_data_set_of_its_layout(tmp_path, monkeypatch, layout, task):
    monkeypatch.setattr(export, "SHARD_SIZE", 2)
    export.export(tmp_path / "w", layout, 5, seed=2, size=96, split="held_out")
    if layout == "webdataset":
        assert [path.name for path in sorted((tmp_path / "w").iterdir())] == [f"shard-0000{i}.tar" for i in range(3)]
    source = opened(layout, tmp_path / "w", task)
    assert len(source) == 5
    for index, example in enumerate(source):
        if task == "edit":
            edit = edits.sample(index, 2, split="held_out")
            text, scenes = edit.instruction, [edit.target, edit.source]
        else:
            sample = prompts.sample(index, 2, split="held_out")
            text, scenes = sample.caption, [sample.scene]
        assert example.text.strip() == text
        for picture, scene in zip((example.target, *example.references), scenes, strict=True):
            np.testing.assert_array_equal(np.asarray(load_image(picture)), render(scene, 96))
    if layout == "webdataset":
        assert source[4].metadata["tag"] == prompts.sample(4, 2, split="held_out").request.task


def test_exports_are_equal_byte_for_byte(tmp_path):
    for name in ("a", "b"):
        export.export(tmp_path / name, "webdataset", 3)
    assert (tmp_path / "a/shard-00000.tar").read_bytes() == (tmp_path / "b/shard-00000.tar").read_bytes()


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(export, "render", fail)
    with pytest.raises(OSError):
        export.export(tmp_path / "w", "webdataset", 3)
    assert list(tmp_path.iterdir()) == []


def test_bad_requests_are_refused(tmp_path):
    for place, layout, count, message in (
        ("", "folder", 3, "exists"),
        ("x", "p", 3, "layout"),
        ("x", "folder", 0, "count"),
    ):
        with pytest.raises(UserError, match=message):
            export.export(tmp_path / place, layout, count)


def test_the_command_line_previews_and_reports_mistakes(tmp_path):
    command = [sys.executable, "-m", "blip3o_jax.demo"]
    done = subprocess.run([*command, "preview", str(tmp_path / "p.png")], capture_output=True, text=True)
    assert done.returncode == 0 and Image.open(tmp_path / "p.png").size[0] > 500
    done = subprocess.run([*command, "export", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: folder") and done.stderr.count("\n") == 1


def test_a_contact_sheet_shows_captions_under_pictures():
    picture = render(prompts.sample(0).scene)
    sheet = captioned([picture], "a caption")
    assert (sheet[-60:] < 100).any() and np.array_equal(sheet[8:200:3, 8:200:3], picture)
