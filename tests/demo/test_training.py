"""A minute of training on the demo world, seen by its loss and by the verifier."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

pytest.importorskip("grain")

from blip3o_jax import Pipeline
from blip3o_jax.data import images
from blip3o_jax.demo import suite
from blip3o_jax.demo.world.render import render
from blip3o_jax.demo.world.verifier import detect
from blip3o_jax.generate import stages
from blip3o_jax.models import blip3o

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 240


def found(pipeline: Pipeline, params) -> float:
    """Share of things in held-out pictures that the verifier sees in their places after the autoencoder."""
    cases = suite.build(["reconstruct"], 40)
    pixels = np.stack([render(case.given, 64) for case in cases]).astype(np.float32) / 127.5 - 1
    made = images.to_uint8(np.asarray(stages.round_trip(pipeline.config, params, pixels)))
    hits = []
    for case, picture in zip(cases, made, strict=True):
        centers = np.array([seen.center for seen in detect(picture)]).reshape(-1, 2)
        things = case.given.objects if case.given.sign is None else [case.given.sign]
        hits += [(np.abs(centers - (thing.x, thing.y)).max(axis=1) <= suite.TOLERANCE).any() for thing in things]
    return float(np.mean(hits))


@pytest.mark.slow
def test_a_minute_of_training_moves_the_loss_and_the_verifier(tmp_path):
    changes = {"loop.num_steps": STEPS, "loop.log_every": 10, "optimizer.warmup_steps": 20, "export_ema": False}
    command = [sys.executable, "train.py", "--config=configs/demo.py:vae", f"--workdir={tmp_path}"]
    command += [f"--config.{key}={value}" for key, value in changes.items()]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0 and done.stderr == "", done.stderr[-2000:]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == STEPS and records[-1]["psnr"] > records[0]["psnr"] + 4
    assert records[-1]["loss_pixel"] < 0.4 * records[0]["loss_pixel"]
    pipeline = Pipeline.from_pretrained(tmp_path / "model")
    untrained = {"autoencoder": blip3o.init(pipeline.config, jax.random.key(0))["autoencoder"]}
    assert found(pipeline, pipeline.params) > found(pipeline, untrained) + 0.2
