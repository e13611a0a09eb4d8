"""The native checkpoint layout: sharded parameters, and what is needed to restore the released layout.

blip3o_jax.json      format, package version, id (`identity`), configuration, tensors of the imported checkpoint
params/              parameter tree (Orbax)
released/            tokenizer and configuration files, unchanged
unused.safetensors   tensors that the model does not use
checksums.json       checksums of params/ and unused.safetensors, verified when loading
"""

import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from blip3o_jax import checksums
from blip3o_jax.config import BACKBONES, Blip3oConfig, registry
from blip3o_jax.config.schema import from_dict, to_dict
from blip3o_jax.convert import identity, safetensors_io
from blip3o_jax.convert.engine import count_nonfinite
from blip3o_jax.convert.fields import Fields
from blip3o_jax.convert.sources import DTYPE_NAMES, DTYPES, TensorSource
from blip3o_jax.convert.staging import check_space, staged_directory
from blip3o_jax.errors import UserError, require
from blip3o_jax.sharding import shardings_of
from blip3o_jax.treepath import flatten, unflatten
from blip3o_jax.version import __version__

FORMAT = 1
CHUNK_BYTES = 128_000_000
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json",
                   "special_tokens_map.json", "chat_template.jinja")  # fmt: skip
META, PARAMS, RELEASED, UNUSED = "blip3o_jax.json", "params", "released", "unused"


@dataclasses.dataclass(frozen=True)
class Origin:
    """What is kept of a released checkpoint, to export a model in the released layout again."""

    files: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)  # relative path -> file to copy
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)  # relative path -> contents to write
    unused: Mapping[str, str] = dataclasses.field(default_factory=dict)  # tensor of `source` not in the model -> reason
    source: TensorSource | None = None  # contains the unused tensors; None: there are none
    dtypes: Mapping[str, np.dtype] = dataclasses.field(default_factory=dict)  # tensor -> its dtype
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)  # tensor that duplicates another -> that one

    @classmethod
    def of_tokenizer(cls, directory: pathlib.Path) -> "Origin":
        """Returns the origin of a model trained from scratch: its tokenizer files."""
        return cls(files={name: directory / name for name in TOKENIZER_FILES if (directory / name).exists()})

    def copy_files(self, directory: pathlib.Path) -> None:
        """Writes `files` and `texts` to a directory."""
        for name in (*self.files, *self.texts):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
        for name, path in self.files.items():
            shutil.copyfile(path, directory / name)
        for name, text in self.texts.items():
            (directory / name).write_text(text)


def files_below(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns relative path -> file, for all files in a folder and its subfolders."""
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def save_native(
    directory: pathlib.Path,
    config: Blip3oConfig,
    params: Any,
    origin: Origin | None = None,
    replace: bool = False,
) -> None:
    """Writes a checkpoint atomically; to be called by all processes of a distributed run.

    Args:
      params: nested dictionaries of arrays, global ones in a distributed run.
      origin: origin of the parameters; None: trained from scratch.
      replace: replace an existing checkpoint once the new one is complete.

    Raises:
      UserError: the directory exists or cannot be written, or the disk is full.
    """
    import orbax.checkpoint as ocp  # slow to import, and not needed for sampling from a released checkpoint

    origin = origin or Origin()
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    with staged_directory(directory, replace) as staging:
        check_space(staging, needed)
        own_id = identity.identity_of(config, params)
        # weights hardly compress; in chunks, a process reads little more than its windows
        save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
        handler = ocp.PyTreeCheckpointHandler(use_compression=False, save_concurrent_gb=_in_flight(flatten(params)))
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(staging.absolute() / PARAMS, args=ocp.args.PyTreeSave(params, save_args=save_args))
        if jax.process_index() == 0:
            origin.copy_files(staging / RELEASED)
            if origin.unused:
                held = {key: origin.source[key] for key in origin.unused}
                safetensors_io.write_weights(staging, held, UNUSED, shard_bytes=2**62)
            meta = {
                "format": FORMAT,
                "version": __version__,
                "id": own_id,
                "config": to_dict(config),
                "unused": dict(origin.unused),
                "aliases": dict(origin.aliases),
                "dtypes": {key: DTYPE_NAMES[np.dtype(dtype)] for key, dtype in origin.dtypes.items()},
            }
            (staging / META).write_text(json.dumps(meta, indent=1) + "\n")
            checksums.write_checksums(staging, [PARAMS, f"{UNUSED}.safetensors"])


def read_meta(directory: pathlib.Path) -> Fields:
    """Reads blip3o_jax.json; raises UserError if it cannot be read or has another format."""
    meta = Fields(directory / META)
    what = f"{meta.path}: format {meta.get('format')!r} of version {meta.get('version')}"
    do = "install a blip3o_jax that is as new as the checkpoint"
    require(meta.get("format") == FORMAT, what, None, f"format {FORMAT}", do)
    return meta


def read_config(directory: pathlib.Path, backbone: str | None = None) -> Blip3oConfig:
    """Reads the configuration of a checkpoint; raises UserError if it is invalid.

    A diffusion backbone from another package is refused unless `backbone`, `package.module:attribute`, names it.
    """
    config = read_meta(directory).typed(dict, "config")
    name = config["dit"].get("name") if isinstance(config.get("dit"), dict) else None
    if isinstance(name, str):
        registry.check_trusted(BACKBONES, name, backbone, "backbone", directory)
    return from_dict(Blip3oConfig, config, "config")


def read_origin(directory: pathlib.Path) -> Origin:
    """Reads the origin of a checkpoint; raises UserError if its description is invalid or does not fit its files."""
    meta = read_meta(directory)
    checksums.verify(directory, f"{UNUSED}.safetensors")
    unused, dtypes, aliases = (meta.typed(dict, name) for name in ("unused", "dtypes", "aliases"))
    for key, name in dtypes.items():
        require(name in [*DTYPES], f"{meta.path}.dtypes.{key}", repr(name), " | ".join(DTYPES), "copy it again")
    source = safetensors_io.open_file(directory / f"{UNUSED}.safetensors") if unused else {}
    lost = sorted(unused.keys() - source.keys())
    what = f"{directory / UNUSED}.safetensors: no {', '.join(lost[:4])}"
    require(not lost, what, None, f"all that {META} lists as unused", "copy the checkpoint again")
    return Origin(
        files=files_below(directory / RELEASED),
        unused=unused,
        source=source or None,
        dtypes={key: DTYPES[name] for key, name in dtypes.items()},
        aliases=aliases,
    )


def load_native(
    directory: pathlib.Path, abstract: Any, mesh: Any = None, param_dtype: str | None = None, check_finite: bool = True
) -> dict[str, Any]:
    """Returns parameters as nested dictionaries of jax arrays, sharded over any mesh.

    Args:
      abstract: part -> annotated shapes, of the parts to load.
      mesh, param_dtype, check_finite: as in `ReleasedCheckpoint.load_params`.

    Raises:
      UserError: files are missing or damaged, shapes differ from the configuration, or weights are not finite.
    """
    import orbax.checkpoint as ocp  # slow to import, and not needed for sampling from a released checkpoint

    path = directory.absolute() / PARAMS
    checksums.verify(directory, PARAMS)
    stored = stored_leaves(directory)
    wanted = flatten(nn.meta.unbox(abstract))
    wrong = [
        f"{name} got {list(stored[name].shape) if name in stored else 'nothing'} expected {list(leaf.shape)}"
        for name, leaf in wanted.items()
        if name not in stored or tuple(stored[name].shape) != tuple(leaf.shape)
    ]
    what = f"{directory}: {len(wrong)} parameters do not fit its configuration ({'; '.join(wrong[:4])})"
    require(not wrong, what, None, "one checkpoint's files", "copy it again")
    shardings = flatten(shardings_of(abstract, mesh))
    single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, param_dtype or stored[name].dtype, sharding=shardings[name] or single)
        for name, leaf in wanted.items()
    }
    item = unflatten(target)
    args = ocp.checkpoint_utils.construct_restore_args(item)
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_in_flight(target, stored))
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            params = checkpointer.restore(path, args=ocp.args.PyTreeRestore(item, args, partial_restore=True))
    except (ValueError, OSError, KeyError) as error:
        raise _unreadable(path, error) from None
    for name, leaf in flatten(params).items() if check_finite else ():
        shards = (shard for shard in leaf.addressable_shards if shard.replica_id == 0)
        bad = sum(count_nonfinite(np.asarray(shard.data)) for shard in shards)
        what = f"{directory}: {bad} values of {name} are NaN or infinite"
        do = "use an earlier checkpoint, or load it with check_finite=False"
        require(not bad, what, None, "finite weights", do)
    return params


def stored_leaves(directory: pathlib.Path) -> dict[str, Any]:
    """Returns path -> shape and dtype of stored parameters; raises UserError if files are missing or damaged."""
    import orbax.checkpoint as ocp  # slow to import, and not needed for sampling from a released checkpoint

    path = directory.absolute() / PARAMS
    require(path.is_dir(), path, "nothing", "the parameters of the checkpoint", "copy it again")
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            tree = checkpointer.metadata(path).item_metadata.tree
    except (ValueError, OSError, KeyError, AttributeError) as error:
        raise _unreadable(path, error) from None
    return flatten(tree)


def _unreadable(path: pathlib.Path, error: Exception) -> UserError:
    return UserError(path, got=checksums.storage_reason(error), expected="a complete checkpoint", do="copy it again")


def _in_flight(*trees: Mapping[str, Any]) -> int:
    """Returns Orbax's limit on concurrent transfers in GB: enough for the largest leaf, and little more."""
    sizes = [math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaves in trees for leaf in leaves.values()]
    return 1 + max(sizes, default=0) // 10**9
