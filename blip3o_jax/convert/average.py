"""Averages the weights of models of one geometry.

Runs of reinforcement learning from one start with different seeds share a direction and differ by noise, which
averaging reduces. The average is not always better than each: evaluate it (docs/reinforcement.md has one case of either
kind).
Source: model soups (arXiv 2203.05482), weight-averaged policies (arXiv 2406.16768).
"""

import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from blip3o_jax.config import schema
from blip3o_jax.convert import checkpoint, native
from blip3o_jax.errors import UserError, require
from blip3o_jax.models import blip3o


def average(sources: Sequence[checkpoint.Path], target: pathlib.Path, backbone: str | None = None) -> None:
    """Writes the mean of checkpoints, float32 in the native layout; configuration and texts are those of the first one.

    Args:
      sources: two checkpoints or more, in either layout.
      target: a new directory.
      backbone: see `checkpoint.open_checkpoint`.

    Raises:
      UserError: fewer, or of different geometries.
    """
    require(len(sources) >= 2, "average", f"{len(sources)} checkpoint", "two or more", "name others, too")
    opened = [checkpoint.open_checkpoint(source, backbone=backbone) for source in sources]
    first, *others = opened
    for each in opened:
        checkpoint.check_backbone(each, backbone)
    for source, other in zip(sources[1:], others, strict=True):
        for name, (got, expected) in schema.differences(other.config, first.config).items():
            raise UserError(
                f"{source}: {name} is {got}",
                expected=f"{expected}, as in {sources[0]}",
                do="choose models of one geometry",
            )
    params = {}
    for part in blip3o.initializers(first.config):
        trees = [each.load_params(param_dtype="float32", parts=[part])[part] for each in opened]
        params[part] = jax.tree.map(
            lambda *leaves: np.mean(leaves, axis=0, dtype=np.float64).astype(np.float32), *trees
        )
    native.save_native(target, first.config, params, first.origin())
