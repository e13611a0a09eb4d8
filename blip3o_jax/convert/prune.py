"""Drops blocks of the diffusion transformer: a smaller and faster one to fine-tune.

The blocks that are kept are unchanged. What the others did is lost until fine-tuning restores it (docs/customize.md).

Source: SANA-1.5 (arXiv 2501.18427), which removes blocks of the least importance and fine-tunes.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.model import SanaConfig
from blip3o_jax.convert import checkpoint, engine, native, staging
from blip3o_jax.convert.tables import PARTS
from blip3o_jax.errors import UserError, require
from blip3o_jax.models.blip3o import abstract_params


def prune(source: checkpoint.Path, target: pathlib.Path, blocks: Sequence[int]) -> Blip3oConfig:
    """Writes a checkpoint whose diffusion transformer has some blocks of `source`, native layout.

    Args:
      blocks: indices of the blocks to keep, from 0, increasing.

    Returns:
      The geometry of the checkpoint written.

    Raises:
      UserError: indices that do not increase or that the transformer lacks, another backbone than SANA, or an
        existing `target`.
    """
    opened = checkpoint.open_checkpoint(source)
    dit = opened.config.dit
    if not isinstance(dit, SanaConfig):
        raise UserError(f"{source}: the backbone is {dit.name}", expected="sana", do="prune a model of SANA")
    fits = blocks and list(blocks) == sorted({*blocks} & {*range(dit.depth)})
    expected = f"increasing numbers from 0 to {dit.depth - 1}"
    require(fits, "--blocks", " ".join(map(str, blocks)) or "none", expected, "correct them")
    staging.check_target(target)
    params = opened.load_params()
    numbers = np.array(blocks)
    params["dit"]["blocks"] = jax.tree.map(lambda leaf: leaf[numbers], params["dit"]["blocks"])
    config = dataclasses.replace(opened.config, dit=dataclasses.replace(dit, depth=len(blocks)))
    origin = opened.origin()
    names = {key for leaf in engine.expand(abstract_params(config), PARTS) for key in leaf.keys}
    kept = {key: dtype for key, dtype in origin.dtypes.items() if key in names}
    native.save_native(target, config, params, dataclasses.replace(origin, dtypes=kept))
    return config
