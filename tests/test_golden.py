"""Recordings of the reference, through `convert`: every network, every table, whole inference passes.

`pytest tests/test_golden.py --golden-dir DIR` runs them on any directory laid out as tests/golden.
"""

import functools
import pathlib

import numpy as np
import pytest

from blip3o_jax.convert.checkpoint import open_checkpoint
from golden_checks import (
    autoencoder,
    decoder,
    diffusion,
    image_tokenizer,
    inference,
    preprocessing,
    reinforcement,
    training,
)

CHECKS = {
    f"{module.__name__.rpartition('.')[2]}.{name.removeprefix('check_')}": getattr(module, name)
    for module in (preprocessing, image_tokenizer, autoencoder, decoder, diffusion)
    for name in sorted(vars(module))
    if name.startswith("check_")
}


RL_CHECKS = {name: check for name, check in sorted(vars(reinforcement).items()) if name.startswith("check_")}


@functools.cache
def opened(folder: pathlib.Path):
    """Recording, parameters in float32, configuration."""
    checkpoint = open_checkpoint(folder / "checkpoint")
    with np.load(folder / "golden.npz") as file:
        recording = dict(file)
    return recording, checkpoint.load_params(param_dtype="float32"), checkpoint.config


@pytest.mark.parametrize("check", CHECKS)
def test_module(golden_dir, check):
    CHECKS[check](*opened(golden_dir))


def test_whole_inference_pass(golden_dir):
    inference.check_whole_pass(*opened(golden_dir), golden_dir)


def test_training_pass(golden_dir):
    training.check_training_pass(*opened(golden_dir), golden_dir)


@pytest.mark.parametrize("check", RL_CHECKS)
def test_reinforcement(golden_root, check):
    path = golden_root / "rl" / "rl.npz"
    if not path.exists():
        pytest.skip(f"no {path}")
    with np.load(path) as recording:
        RL_CHECKS[check](dict(recording))
