"""Exports a native checkpoint to the released layout. Unchanged tensors are equal bit for bit to the imported ones."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax import files
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.schema import differences
from blip3o_jax.convert import engine, generations, native, released, released_config, released_write, safetensors_io
from blip3o_jax.convert.checkpoint import NativeCheckpoint
from blip3o_jax.convert.fields import Fields
from blip3o_jax.convert.sources import TensorInfo
from blip3o_jax.convert.staging import staged_directory
from blip3o_jax.convert.tables import HEAD_KEY, IMAGE_TOKENIZER_PREFIX, PARTS
from blip3o_jax.errors import require
from blip3o_jax.models.blip3o import abstract_params
from blip3o_jax.treepath import flatten

NUMERICS = ("dtype", "param_dtype", "remat", "unroll", "gain")  # fields that are not part of the geometry


def export_checkpoint(
    checkpoint: NativeCheckpoint,
    target: pathlib.Path,
    dtype: str | None = None,
    shard_bytes: int = safetensors_io.SHARD_BYTES,
) -> engine.Plan:
    """Writes the released layout with one part in memory at a time; returns the plan of what is written, read again.

    Args:
      dtype: dtype of the tensors; default: as when imported, else as stored.
      shard_bytes: size limit of a weight file.

    Raises:
      UserError: a backbone other than SANA, the directory exists or cannot be written, or the disk is full.
    """
    backbone, expected = checkpoint.config.dit.name, "sana, the only one that the released layout has a place for"
    require(backbone == "sana", f"{checkpoint.path}: backbone {backbone}", None, expected, "keep the native layout")
    origin = checkpoint.origin()
    for path in origin.files.values():
        files.contained(checkpoint.path, path, "file of a checkpoint")
    stored = native.stored_leaves(checkpoint.path)
    leaves = [
        dataclasses.replace(leaf, dtype=np.dtype(stored[leaf.path].dtype))
        for leaf in engine.expand(abstract_params(checkpoint.config), PARTS)
    ]
    dtypes = origin.dtypes
    if dtype is not None:
        dtypes = {key: jnp.dtype(dtype) for leaf in leaves for key in leaf.keys}

    @functools.lru_cache(maxsize=1)
    def part(name: str) -> dict:
        return flatten(checkpoint.load_params(parts=[name], check_finite=False))

    def leaf(path: str) -> np.ndarray:
        return np.asarray(jax.device_get(part(path.split("/")[0])[path]))

    own = engine.export_tensors(leaves, leaf, dtypes)
    source = {}
    for key, tensor in own.items():  # an alias follows the tensor that it duplicates
        source |= {key: tensor} | {alias: tensor for alias, original in origin.aliases.items() if original == key}
    source |= {key: origin.source[key] for key in origin.unused}
    lost = sorted(set(origin.dtypes) - set(source))
    what = f"{checkpoint.path}: {len(lost)} tensors have no place in its configuration"
    require(not lost, what, engine.listed(lost), "a place for each", "import the source again")
    with staged_directory(target) as staging:
        origin.copy_files(staging)
        _write_configuration(checkpoint.config, staging, source, HEAD_KEY not in own)
        _for_both_generations(staging)
        safetensors_io.write_weights(staging, source, shard_bytes=shard_bytes)
        return released.open_released(staging).plan()


def _write_configuration(
    config: Blip3oConfig, directory: pathlib.Path, info: Mapping[str, TensorInfo], tied: bool
) -> None:
    """Rewrites the configuration files if they differ from `config`."""
    if (directory / "config.json").exists():
        values = Fields(directory / "config.json")
        diffusion = released.named_folder(directory, values)
        different = differences(released_config.read_config(directory, info, tied, None, diffusion), config)
        if all(name.rpartition(".")[2] in NUMERICS for name in different):
            return
    layers = released_config.count_layers(info, IMAGE_TOKENIZER_PREFIX + released_config.TOWER_LAYERS)
    released_write.write_config(config, directory, layers)


def _for_both_generations(directory: pathlib.Path) -> None:
    """Rewrites files that only one major version of transformers can read; others stay unchanged."""
    for name, change in (
        ("config.json", generations.config_for_both),
        ("tokenizer_config.json", generations.tokenizer_for_both),
    ):
        path = directory / name
        before = Fields.optional(path)
        if before and (after := change(before)) != before:
            path.write_text(json.dumps(after, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
