"""Identity of the frozen encoders: tells whether precomputed codes and latents fit the model that trains on them."""

import os
import pathlib
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp

from blip3o_jax import treepath
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.convert.identity import value_sum
from blip3o_jax.data.config import DataConfig
from blip3o_jax.data.files import MANIFEST, Skipped, expand, place
from blip3o_jax.errors import UserError, require
from blip3o_jax.files import read_json
from blip3o_jax.types import Params

ENCODERS = {"image_tokenizer": r"^image_tokenizer/(?!decode)", "autoencoder": r"^autoencoder/encoder/"}
"""Part of the model -> paths of the parameters that encode an image."""


def encoder_leaves(params: Params) -> dict[str, Any]:
    """Returns path -> leaf, for the parameters that encode images."""
    leaves = treepath.flatten(params).items()
    return {path: leaf for path, leaf in leaves if any(re.search(own, path) for own in ENCODERS.values())}


def identify(model: Blip3oConfig, leaves: dict[str, jax.Array]) -> dict[str, Any]:
    """Computes the identity of the encoders; to be called by all processes.

    It depends on the weights as rounded to bfloat16, and neither on their sharding nor on the machine.

    Args:
      leaves: those of `encoder_leaves`, in float32 or bfloat16.

    Returns:
      Part -> digest of its weights, and the factor of latents, as JSON values.
    """
    parts = {part: [x for path, x in leaves.items() if re.search(own, path)] for part, own in ENCODERS.items()}
    sums = jax.device_get(_sums(parts))
    return {
        **{part: f"{total:08x}" for part, total in sums.items()},
        "scaling_factor": model.autoencoder.scaling_factor,
    }


@jax.jit
def _sums(parts: dict[str, list[jax.Array]]) -> dict[str, jax.Array]:
    """Returns sums u32[] of hashed values, which are exact in any order."""
    return {part: sum(map(value_sum, leaves), jnp.uint32(0)) for part, leaves in parts.items()}


def check_precomputed(data: DataConfig, own: dict[str, Any]) -> None:
    """Compares the encoders of precomputed sources with `own`, those of the model.

    Sources without a record of their encoders (earlier versions) are named in one line of warning.

    Raises:
      UserError: a source was precomputed by other encoders, or not to its end.
    """
    unknown = []
    for source in data.sources:
        if source.kind != "arrayrecord":
            continue
        folders = {os.path.dirname(file) for file in expand(place(source.path), (".array_record",), Skipped())}
        for manifest in (pathlib.Path(folder) / MANIFEST for folder in sorted(folders)):
            facts = read_json(manifest, "manifest") if manifest.exists() else {}
            _check_finished(manifest, facts)
            made = facts.get("encoders")
            unknown += [str(manifest.parent)] * (made is None)
            different = [name for name, value in (made or {}).items() if value != own.get(name)]
            if different:
                raise UserError(
                    f"{manifest.parent}: precomputed with another {different[0]}",
                    got=made[different[0]],
                    expected=f"{own.get(different[0])}, as in the model that trains",
                    do="precompute the source with this model, or start from a checkpoint with those encoders",
                )
    if unknown and jax.process_index() == 0:
        which = ", ".join(unknown)
        print(f"warning: {which}: no record of the encoders, which must be those of this model", file=sys.stderr)


def _check_finished(manifest: pathlib.Path, facts: dict[str, Any]) -> None:
    """Raises UserError if files of a precomputed source are missing: some worker has not finished."""
    if not {"source", "items_per_file"} <= facts.keys():
        return
    count = -(-facts["source"][2] // facts["items_per_file"])
    found = len(list(manifest.parent.glob("part-*.array_record")))
    what, do = f"{manifest.parent}: precomputed in part", "run `data precompute` with all its workers to the end"
    require(found >= count, what, f"{found} of {count} files", "all of them", do)
