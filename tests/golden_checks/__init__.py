"""What this package computes for the keys of a recording of the reference, part by part."""

import functools
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.convert.checkpoint import open_checkpoint
from blip3o_jax.types import Params

Recording = Mapping[str, np.ndarray]
VALUE, GRADIENT = 1e-5, 1e-4  # largest difference, of the largest recorded value
ROUNDING = 1e-7  # least difference allowed: sums of terms of size 1 and either sign, as on-policy losses are
RESAMPLED = {"max": 2 / 255, "mean": 2e-3}  # of pixels in [-1, 1] that another library has resized


class Sample(NamedTuple):
    """One folder of recordings."""

    folder: pathlib.Path
    recording: Recording
    params: Params  # float32
    config: Blip3oConfig

    def image(self, name: str) -> np.ndarray:
        """A recorded array of images or latents, channels last."""
        return nhwc(self.recording[name])


@functools.cache
def opened(folder: pathlib.Path) -> Sample:
    """The recording and the checkpoint of a folder."""
    checkpoint = open_checkpoint(folder / "checkpoint")
    return Sample(folder, load(folder / "golden.npz"), checkpoint.load_params(param_dtype="float32"), checkpoint.config)


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of an npz file."""
    with np.load(path) as file:
        return dict(file)


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -3, -1)


def nchw(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, -3)


def compare(name: str, got: np.ndarray, recorded: np.ndarray) -> None:
    """Fails unless `got` is what was recorded: ids equal, numbers as close as their kind allows."""
    got, recorded = np.asarray(got), np.asarray(recorded)
    assert got.shape == recorded.shape, name
    if recorded.dtype.kind in "iub":
        np.testing.assert_array_equal(got, recorded, name)
        return
    difference = np.abs(got.astype(np.float64) - recorded)
    if name.startswith("pre_"):
        assert difference.max() <= RESAMPLED["max"] and difference.mean() <= RESAMPLED["mean"], name
        return
    allowed = (GRADIENT if "grad" in name else VALUE) * np.abs(recorded).max()
    assert difference.max() <= max(allowed, ROUNDING), f"{name}: {difference.max()} > {allowed}"
