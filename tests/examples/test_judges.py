"""examples/reward.py and examples/detector.py, from a directory outside of the package."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def outside(tmp_path):
    """A directory with the examples in it, and what runs Python there."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")

    def python(*arguments):
        paths = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        environment = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    return tmp_path, python


def test_a_detector_of_ones_own_scores_a_folder_and_refuses_what_it_does_not_know(outside):
    directory, python = outside
    wanted = {"tag": "colors", "prompt": "a red flag", "include": [{"class": "flag", "count": 1, "color": "red"}]}
    for number, color in enumerate([(220, 30, 30), (30, 60, 200)]):
        samples = directory / "images" / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(wanted))
        Image.new("RGB", (64, 64), color).save(samples / "0000.png")
    score = ["-m", "blip3o_jax.evals", "geneval", "score", "images", "--detector", "my_detector:Flags"]
    shutil.copy(directory / "examples" / "detector.py", directory / "my_detector.py")
    done = python(*score)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (directory / "images" / "results.jsonl").read_text().splitlines()]
    assert [row["correct"] for row in rows] == [True, False]
    wanted["include"][0]["class"] = "bench"
    (directory / "images" / "00001" / "metadata.jsonl").write_text(json.dumps(wanted))
    done = python(*score)
    assert done.returncode == 2 and "got class 'bench', which the detector my_detector:Flags" in done.stderr


TRAIN = """
import sys
import numpy as np
from PIL import Image
from blip3o_jax.errors import UserError
from blip3o_jax.rl.judge import Judge, RewardConfig
from blip3o_jax.types import RewardInput
judge = Judge([RewardConfig("my_reward:Palette", options={"bins": 4})])
red, blue = (np.full((8, 8, 3), color, np.uint8) for color in ((200, 0, 0), (0, 0, 200)))
print(judge([RewardInput("x", red, (red,)), RewardInput("x", red, (blue,))])[0].tolist())
try:
    judge.check([RewardInput("a caption", None)])
except UserError as error:
    print(error)
"""


def test_a_reward_of_ones_own_sees_the_reference_image(outside):
    directory, python = outside
    shutil.copy(directory / "examples" / "reward.py", directory / "my_reward.py")
    done = python("-c", TRAIN)
    assert done.returncode == 0, done.stderr
    values, refused = done.stdout.splitlines()
    assert json.loads(values) == [1.0, 0.0]
    assert refused.startswith("palette reward: got 'a caption' - expected a reference image")


@pytest.mark.parametrize("name", ["reward", "detector"])
def test_an_example_stays_short(name):
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 100
