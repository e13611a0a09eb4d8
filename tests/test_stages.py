"""The five stages of configs/tiny.py through train.py, each from the model of the one before: the tutorial."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("grain")

from blip3o_jax import Pipeline

ROOT = pathlib.Path(__file__).parent.parent
# Stage -> what must have fallen, and to which share: the mean of the last five steps in terms of the first three
STAGES = {
    "vae": {"loss_pixel": 0.3},
    "tokenizer": {"loss_pixel": 0.4},
    "pretrain": {"loss_ce": 0.8, "loss_flow": 0.5},
    "sft": {"loss_ce": 0.5},
    "edit": {"loss_ce": 0.8, "loss_flow": 0.5},
}


def train(stage, directory, before=None):
    """The records of a stage that train.py made."""
    command = [sys.executable, "train.py", f"--config=configs/tiny.py:{stage}", f"--workdir={directory}"]
    command += [] if before is None else [f"--config.init_from={before}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == "", done.stderr
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_stage_learns_from_the_model_of_the_one_before_and_the_last_edits(tmp_path):
    model = None
    for stage, falls in STAGES.items():
        records = train(stage, tmp_path / stage, model)
        assert [record["step"] for record in records] == list(range(1, 31))
        for name, share in falls.items():
            values = [record[name] for record in records]
            assert np.mean(values[-5:]) < share * np.mean(values[:3]), (stage, name, values)
        assert all(record["images_per_s"] > 0 for record in records[1:])
        model = tmp_path / stage / "model"
    pipeline = Pipeline.from_pretrained(model)
    references = [Image.new("RGB", (32, 32), color) for color in ("red", "white")]
    edits = [pipeline("make it blue", image=image, num_inference_steps=2).images[0] for image in references]
    assert [edit.size for edit in edits] == [(32, 32)] * 2
    assert np.abs(np.asarray(edits[0], float) - np.asarray(edits[1], float)).mean() > 0.2
