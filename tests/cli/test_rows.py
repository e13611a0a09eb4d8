"""Rows of a prompts file: data, never a reason to import code."""

import json

import numpy as np
import pytest

from blip3o_jax.cli.rows import read_images, read_rows
from blip3o_jax.cli.sample import parser
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.images import save_png
from blip3o_jax.data.prompt_file import PromptFile
from blip3o_jax.errors import UserError


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A working directory with a module that must not be imported unless it is named on the command line."""
    (tmp_path / "mine.py").write_text(
        "import pathlib\nfrom blip3o_jax.text.tasks import Task\npathlib.Path('imported').touch()\n"
        "task = Task(message='Draw {text}')\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(outside, row, *flags):
    (outside / "prompts.jsonl").write_text(json.dumps({"prompt": "x", **row}) + "\n")
    return read_rows(parser().parse_args(["--prompts_file", "prompts.jsonl", *flags]))


@pytest.mark.parametrize("row", [{"task": "mine:task"}, {"sampler": "mine:task"}])
def test_a_file_alone_never_imports_code(outside, row):
    ((name, value),) = row.items()
    for flags in ((), (f"--{name}", "other:thing")):
        with pytest.raises(UserError, match=rf"prompts.jsonl.*its {name} 'mine:task' is code outside .*[(]--{name} on"):
            rows(outside, row, *flags)
    assert not (outside / "imported").exists()


def test_what_the_command_line_or_a_data_source_names_too_is_used(outside):
    (row,) = rows(outside, {"task": "mine:task"}, "--task", "mine:task")
    assert row.task == "mine:task" and (outside / "imported").exists()
    (outside / "prompts.jsonl").write_text(json.dumps({"prompt": "x", "task": "mine:task"}) + "\n")
    assert len(PromptFile(SourceConfig("prompts", "prompts.jsonl", "mine:task"))) == 1
    with pytest.raises(UserError, match="its task 'mine:task' is code outside"):
        PromptFile(SourceConfig("prompts", "prompts.jsonl", "t2i"))


def test_an_edit_without_its_image_takes_that_of_the_command_line(outside):
    record = {"task": "edit", "image": []}  # as the server writes it
    assert [row.images for row in rows(outside, record, "--image", "a.png")] == [("a.png",)]
    assert [row.images for row in rows(outside, {"task": "t2i", "image": []}, "--image", "a.png")] == [()]
    with pytest.raises(UserError, match="image: got none for task edit .* give --image FILE"):
        rows(outside, record)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": " "}, "prompt: got an empty one"),
        ({"task": "edit"}, "image: got none for task edit"),
        ({"task": "t2i", "image": "a.png"}, "image: got a.png for task t2i"),
        ({"task": "reconstruct", "image": "a.png", "best_of": 2}, "best_of: got 2 for task reconstruct"),
    ],
)
def test_a_row_that_is_refused_is_named_with_its_line(outside, row, message):
    with pytest.raises(UserError, match=f"prompts_file: prompts.jsonl:1: {message}"):
        rows(outside, row)


def test_an_image_that_cannot_be_read_is_named_with_the_line_that_names_it(outside):
    (outside / "broken.png").write_bytes(b"no image")
    listed = [{}, {"image": ["broken.png"], "adapter": "a"}, {"image": "gone.png"}]
    (outside / "edits.jsonl").write_text("\n".join(json.dumps({"prompt": "x", **row}) for row in listed))

    def told(*flags):
        with pytest.raises(UserError) as raised:
            read_images(read_rows(parser().parse_args([*flags])), 1)
        return str(raised.value)

    given = ("--prompts_file", "edits.jsonl")
    assert told(*given).startswith("prompts_file: edits.jsonl:2: image: got broken.png, which is not a readable image")
    assert told(*given, "--image", "gone.png").startswith("image: got gone.png: No such file")
    save_png(np.zeros((8, 8, 3), np.uint8), outside / "broken.png")
    assert told(*given).startswith("prompts_file: edits.jsonl:3: image: got gone.png: No such file")


@pytest.mark.parametrize("images", [1, 2, 3])
def test_as_many_images_as_prompts_are_said_not_to_be_pairs(tmp_path, monkeypatch, capsys, images):
    monkeypatch.chdir(tmp_path)
    words = [word for prompt in ("x", "y") for word in ("--prompt", prompt)]
    words += [word for number in range(images) for word in ("--image", f"{number}.png")]
    found = read_rows(parser().parse_args(words))
    assert [len(row.images) for row in found] == [images] * 2
    assert ("all 2 images are references of every prompt" in capsys.readouterr().err) == (images == 2)


@pytest.mark.parametrize(
    ("row", "flags", "told"),
    [
        ({"seed": 3, "top_k": 5}, ("--seed", "7", "--top_k", "9"), "--seed, --top_k"),
        ({"negative_prompt": None}, ("--negative_prompt", "dark"), "--negative_prompt"),
        ({"seed": 3}, ("--seed", "3"), None),  # the same
        ({"seed": 3}, (), None),
        ({"seed": 3}, ("--seed", "7", "--prompt", "y"), None),  # of use for the other prompt
    ],
)
def test_a_flag_that_every_row_overrides_is_said_to_have_no_effect(outside, capsys, row, flags, told):
    rows(outside, row, *flags)
    note = f"note: prompts_file: prompts.jsonl: no effect, as every row sets it: {told}\n"
    assert capsys.readouterr().err == ("" if told is None else note)
