"""Images on disk: names that many processes take, records that tell of what exists, places that are refused."""

import concurrent.futures
import errno
import json
import multiprocessing
import os

import numpy as np
import pytest
from PIL import Image

from blip3o_jax import files
from blip3o_jax.errors import UserError
from blip3o_jax.outputs import Outputs

NAMES = ("prompt", "negative_prompt", "num_inference_steps", "sampler", "guidance_scale", "seed", "width", "height")
RECORD = dict.fromkeys(NAMES, "") | {"checkpoint": "a/b", "checkpoint_id": "1", "version": "0"}


def image(value: int = 0) -> Image.Image:
    return Image.fromarray(np.full((2, 2, 3), value, np.uint8))


def write(directory, value: int, count: int) -> None:
    with Outputs(directory) as outputs:
        for _ in range(count):
            outputs.add(image(value), {**RECORD, "seed": value})
        outputs.add_grid([image(value)] * 2, 2)


def test_processes_that_share_a_directory_lose_nothing(tmp_path):
    with concurrent.futures.ProcessPoolExecutor(4, multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(write, tmp_path, value, 25) for value in range(4)]:
            done.result()
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert sorted(row["file"] for row in rows) == [f"{number:05d}.png" for number in range(100)]
    for row in rows:
        assert Image.open(tmp_path / row["file"]).getpixel((0, 0))[0] == row["seed"]
    grids = {Image.open(path).getpixel((0, 0))[0] for path in tmp_path.glob("grid*.png")}
    assert grids == {0, 1, 2, 3} and not list(tmp_path.glob(".*"))


def test_a_name_that_is_taken_meanwhile_is_left_alone(tmp_path):
    with Outputs(tmp_path) as outputs:
        (tmp_path / "00000.png").write_text("other")
        (tmp_path / ".00001.png.part").touch()  # somebody writes it
        (tmp_path / "00002.png").symlink_to("nowhere")
        assert outputs.add(image(), RECORD).name == "00003.png"
    assert (tmp_path / "00000.png").read_text() == "other"


def test_a_named_file_is_replaced_also_through_a_link_but_not_that_of_another_process(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("earlier")
    with Outputs("", path) as outputs, Outputs("", path) as late:
        assert outputs.add(image(3), RECORD) == path
        with pytest.raises(UserError, match="another process has written meanwhile"):
            late.add(image(5), RECORD)
    assert Image.open(path).getpixel((0, 0)) == (3, 3, 3) and os.listdir(tmp_path) == ["a.png"]
    (tmp_path / "link.png").symlink_to("file.png")
    with Outputs("", tmp_path / "link.png") as outputs:
        outputs.add(image(), RECORD)
    assert (tmp_path / "link.png").is_symlink() and Image.open(tmp_path / "file.png").size == (2, 2)


@pytest.mark.parametrize("name", ["", " ", "a\0b.png", "a.jpg", "png", ".png", "folder.png", "pipe.png", "null.png"])
def test_what_is_no_png_file_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder.png")
    os.mkfifo("pipe.png")
    os.symlink("/dev/null", "null.png")
    with pytest.raises(UserError, match="^output: got"):
        Outputs("", name)
    assert sorted(os.listdir()) == ["folder.png", "null.png", "pipe.png"]


@pytest.mark.parametrize("name", ["samples.jsonl", "grid.png"])
def test_a_directory_with_special_files_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="not a regular file"):
        Outputs(tmp_path)


def test_a_line_starts_anew_behind_a_torn_one(tmp_path):
    (tmp_path / "f").write_text('{"a": 1}\n{"b"')
    files.append_line(tmp_path / "f", "{}")
    assert (tmp_path / "f").read_text() == '{"a": 1}\n{"b"\n{}\n'


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    (tmp_path / "f").write_text("a\n")
    real = os.write
    monkeypatch.setattr(files.os, "write", lambda file, content: real(file, content[:3]))
    with pytest.raises(UserError, match=os.strerror(errno.ENOSPC)):
        files.append_line(tmp_path / "f", "long line")
    assert (tmp_path / "f").read_text() == "a\n"
