"""A run of train.py: its configuration (`config`), initial parameters (`start`) and composition (`composition`)."""

from blip3o_jax.experiment.adapter import split
from blip3o_jax.experiment.composition import build, open_stream, row_layout
from blip3o_jax.experiment.config import ExperimentConfig, from_settings
from blip3o_jax.experiment.start import Start, open_start

__all__ = [
    "ExperimentConfig",
    "Start",
    "build",
    "from_settings",
    "open_start",
    "open_stream",
    "row_layout",
    "split",
]
