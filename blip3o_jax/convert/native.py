"""The native checkpoint layout: sharded parameters, and everything needed to restore the released layout.

blip3o_jax.json      format, package version, id, configuration, record of the source's tensors
params/              the parameter tree (Orbax)
released/            tokenizer and configuration files, unchanged
unused.safetensors   tensors that the model never uses
checksums.json       of params/ and unused.safetensors, compared when they are loaded
"""

import dataclasses
import json
import math
import pathlib
import shutil
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from blip3o_jax import checksums
from blip3o_jax.config import BACKBONES, Blip3oConfig, registry
from blip3o_jax.config.schema import from_dict, to_dict
from blip3o_jax.convert import safetensors_io
from blip3o_jax.convert.engine import count_nonfinite
from blip3o_jax.convert.released_config import Fields
from blip3o_jax.convert.sources import DTYPE_NAMES, DTYPES, TensorSource
from blip3o_jax.convert.staging import check_space, staged_directory
from blip3o_jax.errors import UserError, require
from blip3o_jax.sharding import shardings_of
from blip3o_jax.treepath import flatten, unflatten
from blip3o_jax.version import __version__

FORMAT = 1
CHUNK_BYTES = 128_000_000
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
META, PARAMS, RELEASED, UNUSED = "blip3o_jax.json", "params", "released", "unused"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Everything of a released checkpoint that is needed to export a model in its layout again.

    Attributes:
      files: relative name -> a file to copy (tokenizer, configurations).
      texts: relative name -> contents of a file that is not a copy.
      unused: tensor -> why the model does not use it; they are read from `source`.
      source: holds them; None if there are none.
      dtypes: tensor -> its type.
      aliases: tensor that repeats another one -> that one.
    """

    files: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    source: TensorSource | None = None
    dtypes: Mapping[str, np.dtype] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_tokenizer(cls, directory: pathlib.Path) -> "Origin":
        """Of a model trained from scratch: the files of its text tokenizer."""
        return cls(files={name: directory / name for name in TOKENIZER_FILES if (directory / name).exists()})

    def copy_files(self, directory: pathlib.Path) -> None:
        """Puts the files into `directory`."""
        for name, path in self.files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, directory / name)
        for name, text in self.texts.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(text)


def is_native(directory: pathlib.Path) -> bool:
    """Whether a directory is a checkpoint in the native layout."""
    return (directory / META).exists()


def save_native(
    directory: pathlib.Path,
    config: Blip3oConfig,
    params: Any,
    origin: Origin | None = None,
    identity: str | None = None,
    replace: bool = False,
) -> None:
    """Writes a checkpoint; every process of a distributed run calls it with its part of `params`.

    Args:
      directory: a new one; it appears whole or not at all.
      origin: of the checkpoint that the parameters come from; None: trained from scratch.
      identity: label of images made with it; default: a random one.
      replace: replace an existing checkpoint once the new one is complete.

    Raises:
      UserError: the directory exists, cannot be written, or the disk is too small.
    """
    import orbax.checkpoint as ocp  # takes as long as all else of sampling

    origin = origin or Origin()
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    with staged_directory(directory, replace) as staging:
        check_space(staging, needed)
        # weights hardly compress; chunks let every process read little more than its windows
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
                "id": identity or uuid.uuid4().hex[:12],
                "config": to_dict(config),
                "unused": dict(origin.unused),
                "aliases": dict(origin.aliases),
                "dtypes": {key: DTYPE_NAMES[np.dtype(dtype)] for key, dtype in origin.dtypes.items()},
            }
            (staging / META).write_text(json.dumps(meta, indent=1) + "\n")
            checksums.write_checksums(staging, [PARAMS, f"{UNUSED}.safetensors"])


def read_meta(directory: pathlib.Path) -> Fields:
    """Contents of blip3o_jax.json.

    Raises:
      UserError: unreadable, or written by a later version.
    """
    meta = Fields(directory / META)
    if meta.get("format") != FORMAT:
        raise UserError(
            f"{directory / META}: format {meta.get('format')!r} of version {meta.get('version')}",
            expected=f"format {FORMAT}",
            do="install a blip3o_jax that is as new as the checkpoint",
        )
    return meta


def read_config(directory: pathlib.Path, backbone: str | None = None) -> Blip3oConfig:
    """The configuration of a checkpoint in the native layout.

    Args:
      backbone: that the user names; needed for one from outside the package, since it is imported.

    Raises:
      UserError: a configuration that does not fit, or a backbone from outside that was not named.
    """
    config = read_meta(directory).typed(dict, "config")
    name = config["dit"].get("name") if isinstance(config.get("dit"), dict) else None
    if isinstance(name, str):
        registry.check_trusted(BACKBONES, name, backbone, "backbone", directory)
    return from_dict(Blip3oConfig, config, "config")


def read_origin(directory: pathlib.Path) -> Origin:
    """What the checkpoint keeps of a released one."""
    meta = read_meta(directory)
    checksums.verify(directory, f"{UNUSED}.safetensors")
    unused, dtypes, aliases = (meta.typed(dict, name) for name in ("unused", "dtypes", "aliases"))
    released = directory / RELEASED
    files = {str(path.relative_to(released)): path for path in sorted(released.rglob("*")) if path.is_file()}
    return Origin(
        files=files,
        unused=unused,
        source=safetensors_io.open_file(directory / f"{UNUSED}.safetensors") if unused else None,
        dtypes={key: DTYPES[name] for key, name in dtypes.items()},
        aliases=aliases,
    )


def load_native(
    directory: pathlib.Path, abstract: Any, mesh: Any = None, param_dtype: str | None = None, check_finite: bool = True
) -> dict[str, Any]:
    """Restores parameters, laid out on any mesh.

    Args:
      abstract: annotated shapes of the parts that are wanted, by part.
      mesh: None: one device.
      param_dtype: None: as stored.

    Returns:
      Nested dictionaries of jax arrays.

    Raises:
      UserError: missing or damaged files, other shapes than the configuration says, NaN or infinities.
    """
    import orbax.checkpoint as ocp  # takes as long as all else of sampling

    path = directory.absolute() / PARAMS
    checksums.verify(directory, PARAMS)
    stored = stored_leaves(directory)
    wanted = flatten(nn.meta.unbox(abstract))
    wrong = [
        f"{name} got {list(stored[name].shape) if name in stored else 'nothing'} expected {list(leaf.shape)}"
        for name, leaf in wanted.items()
        if name not in stored or tuple(stored[name].shape) != tuple(leaf.shape)
    ]
    if wrong:
        raise UserError(
            f"{directory}: {len(wrong)} parameters do not fit its configuration ({'; '.join(wrong[:4])})",
            expected="one checkpoint's files",
            do="copy it again",
        )
    shardings = flatten(shardings_of(abstract, mesh))
    single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {
        name: jax.ShapeDtypeStruct(leaf.shape, param_dtype or stored[name].dtype, sharding=shardings[name] or single)
        for name, leaf in wanted.items()
    }
    item = unflatten(target)
    restore = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    try:
        with ocp.Checkpointer(
            ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_in_flight(target, stored))
        ) as checkpointer:
            params = checkpointer.restore(path, args=restore)
    except (ValueError, OSError, KeyError) as error:
        raise _unreadable(path, error) from None
    if check_finite:
        _check_finite(directory, flatten(params))
    return params


def stored_leaves(directory: pathlib.Path) -> dict[str, Any]:
    """Path -> shape and type on disk.

    Raises:
      UserError: missing or damaged.
    """
    import orbax.checkpoint as ocp  # takes as long as all else of sampling

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
    """Gigabytes in flight between memory and disk: enough for the largest leaf, and little more."""
    sizes = [math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaves in trees for leaf in leaves.values()]
    return 1 + max(sizes, default=0) // 10**9


def _check_finite(directory: pathlib.Path, leaves: Mapping[str, jax.Array]) -> None:
    for name, leaf in leaves.items():
        shards: Iterable = (shard for shard in leaf.addressable_shards if shard.replica_id == 0)
        if bad := sum(count_nonfinite(np.asarray(shard.data)) for shard in shards):
            raise UserError(
                f"{directory}: {bad} values of {name} are NaN or infinite",
                expected="finite weights",
                do="use an earlier checkpoint, or load it with check_finite=False",
            )
