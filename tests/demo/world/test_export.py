"""The demo world on disk: layouts of real data, complete or not there."""

import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.demo.world import edits, export, prompts
from blip3o_jax.demo.world.render import render
from blip3o_jax.errors import UserError
from blip3o_jax.evals.sheet import captioned


def test_webdataset_holds_pictures_captions_and_metadata(tmp_path):
    export.export(tmp_path / "w", "webdataset", 5, seed=2)
    with tarfile.open(tmp_path / "w" / "shard-00000.tar") as tar:
        assert len(tar.getnames()) == 15
        sample = prompts.sample(3, 2)
        assert tar.extractfile("00000003.txt").read().decode() == sample.caption
        assert np.array_equal(np.asarray(Image.open(tar.extractfile("00000003.png"))), render(sample.scene))
        assert json.load(tar.extractfile("00000003.json"))["tag"] == sample.request.task


def test_webdataset_is_cut_into_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD_SIZE", 2)
    export.export(tmp_path / "w", "webdataset", 5)
    assert [path.name for path in sorted((tmp_path / "w").iterdir())] == [f"shard-0000{i}.tar" for i in range(3)]


def test_jsonl_holds_edits_with_relative_paths(tmp_path):
    export.export(tmp_path / "e", "jsonl", 4, split="held_out")
    rows = [json.loads(line) for line in (tmp_path / "e" / "edits.jsonl").read_text().splitlines()]
    edit = edits.sample(1, split="held_out")
    assert rows[1]["instruction"] == edit.instruction
    assert np.array_equal(np.asarray(Image.open(tmp_path / "e" / rows[1]["output_image"])), render(edit.target))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "e" / rows[1]["input_images"][0])), render(edit.source))


def test_folder_holds_pictures_beside_captions(tmp_path):
    export.export(tmp_path / "f", "folder", 3, size=96)
    assert len(list((tmp_path / "f").iterdir())) == 6
    assert Image.open(tmp_path / "f" / "00000002.png").size == (96, 96)


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
    with pytest.raises(UserError, match="exists"):
        export.export(tmp_path, "folder", 3)
    with pytest.raises(UserError, match="layout"):
        export.export(tmp_path / "x", "parquet", 3)
    with pytest.raises(UserError, match="count"):
        export.export(tmp_path / "x", "folder", 0)


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
