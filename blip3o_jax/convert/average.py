"""Averages the weights of models of one geometry.

Averaging policies that were trained from the same weights with different seeds reduces the noise of single runs. The
average is not always better than each of them: evaluate it (docs/reinforcement.md shows both cases).

Source: model soups (arXiv 2203.05482), weight-averaged policies (arXiv 2406.16768).
"""

import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from blip3o_jax.config import schema
from blip3o_jax.convert import checkpoint, native
from blip3o_jax.convert.staging import check_target
from blip3o_jax.errors import UserError, require
from blip3o_jax.models import blip3o


def average(sources: Sequence[checkpoint.Path], target: pathlib.Path, backbone: str | None = None) -> None:
    """Writes the mean of two or more checkpoints in float32, native layout, with configuration and files of the first.

    Raises UserError for one checkpoint, different geometries, or a directory that exists or cannot be written;
    `backbone` is as for `checkpoint.open_checkpoint`.
    """
    require(len(sources) >= 2, "average", f"{len(sources)} checkpoint", "two or more", "name others, too")
    check_target(target)
    opened = [checkpoint.open_checkpoint(source, backbone=backbone) for source in sources]
    first, *others = opened
    for each in opened:
        checkpoint.check_backbone(each, backbone)
    for source, other in zip(sources[1:], others, strict=True):
        for name, (got, expected) in schema.differences(other.config, first.config).items():
            what, expected = f"{source}: {name} is {got}", f"{expected}, as in {sources[0]}"
            raise UserError(what, expected=expected, do="choose models that agree in it")
    params = {}
    for part in blip3o.initializers(first.config):
        trees = [each.load_params(param_dtype="float32", parts=[part])[part] for each in opened]
        params[part] = jax.tree.map(
            lambda *leaves: np.mean(leaves, axis=0, dtype=np.float64).astype(np.float32), *trees
        )
    native.save_native(target, first.config, params, first.origin())
