"""A task from outside the package: the same conversation in training and in sampling."""

import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("grain")

from blip3o_jax import Pipeline
from blip3o_jax.cli import rows, sample
from blip3o_jax.data.config import DataConfig, Layout, SourceConfig
from blip3o_jax.data.pipeline import BatchStream
from blip3o_jax.errors import UserError
from blip3o_jax.generate.prompts import Prompt, make_request
from blip3o_jax.text import tasks

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8))


@pytest.fixture(autouse=True)
def outside(tmp_path, monkeypatch):
    """A working directory with the example as a module of a user's own, and rows to train on."""
    shutil.copy(EXAMPLES / "task.py", tmp_path)
    (tmp_path / "task.py").open("a").write("\n\ndef broken():\n    return 3\n")
    monkeypatch.chdir(tmp_path)
    tasks._resolved.cache_clear()
    sys.modules.pop("task", None)
    yield tmp_path
    sys.modules.pop("task", None)


@pytest.fixture(scope="module")
def pipeline(golden_root) -> Pipeline:
    return Pipeline.from_pretrained(golden_root / "edit_both" / "checkpoint", "float32")


def test_training_rows_begin_as_the_prompt_of_sampling(pipeline, outside):
    PHOTO.save(outside / "photo.png")
    row = {"txt": "", "image_path": "photo.png", "input_images_paths": ["photo.png"]}
    (outside / "rows.jsonl").write_text(json.dumps(row) + "\n")
    model = pipeline.config
    layout = Layout(
        ("target_tokenizer_pixels", "ref_tokenizer_pixels"), 32, 32, model.image_tokenizer.image_size,
        model.num_image_tokens, model.tokens, length=320, max_references=1,
    )  # fmt: skip
    source = SourceConfig("jsonl", str(outside / "rows.jsonl"), "task:depth")
    stream = BatchStream(DataConfig((source,), 1, num_threads=0), layout, pipeline.tokenizer)
    batch = stream.next()
    stream.close()
    prompt = make_request(model, pipeline.tokenizer, Prompt("task:depth", "", (PHOTO,))).row
    np.testing.assert_array_equal(batch.tokens[0, : len(prompt)], prompt.tokens)
    assert "near is white and far is black" in pipeline.tokenizer.decode(prompt.tokens)
    np.testing.assert_array_equal(batch.ref_mask, [[True]])


def test_it_samples_by_name_and_heeds_its_message(pipeline):
    made = [
        pipeline("", image=PHOTO, task="task:depth", num_inference_steps=2, guidance_scale=30.0),
        pipeline("dog", image=PHOTO, task="task:segmentation", num_inference_steps=2, guidance_scale=30.0),
    ]
    assert (made[0].token_ids != made[1].token_ids).any()


def test_a_command_line_may_leave_the_prompt_out_if_the_task_has_a_text(outside):
    flags = ["--image", "photo.png", "--image", "other.png"]
    [row] = rows.read_rows(sample.parser().parse_args(["--task", "task:depth", *flags]))
    assert (row.prompt, row.task, row.images) == ("", "task:depth", ("photo.png", "other.png"))
    with pytest.raises(UserError, match="prompt: got none"):
        rows.read_rows(sample.parser().parse_args(["--task", "task:segmentation", *flags]))


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("task:segmentation", "", "prompt: got an empty one"),
        ("task:nothing", "dog", "task task:nothing: got AttributeError"),
        ("task:broken", "dog", "task task:broken: got a function - expected an instance of Task"),
        ("tsk:depth", "dog", "task tsk:depth: got ModuleNotFoundError"),
        ("depht", "dog", "task: got 'depht' - expected one of edit, reconstruct, t2i"),
    ],
)
def test_what_does_not_fit_is_refused(pipeline, task, text, message):
    with pytest.raises(UserError, match=message):
        pipeline(text, image=PHOTO, task=task)
