"""Opens checkpoints in either layout.

checkpoint = open_checkpoint("path/or/hf://org/name")
config = checkpoint.config
params = checkpoint.load_params(mesh=mesh, param_dtype="bfloat16")
"""

import dataclasses
import pathlib
from typing import Any

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.convert import engine, hub, native, released, weight_files
from blip3o_jax.convert.released import ReleasedCheckpoint
from blip3o_jax.convert.staging import check_target
from blip3o_jax.convert.tables import chosen
from blip3o_jax.errors import UserError, require
from blip3o_jax.models.blip3o import abstract_params

Path = str | pathlib.Path


@dataclasses.dataclass(frozen=True)
class NativeCheckpoint:
    """A checkpoint in the native layout; see `ReleasedCheckpoint`."""

    path: pathlib.Path
    config: Blip3oConfig
    identity: str

    @property
    def tokenizer_dir(self) -> pathlib.Path:
        """Directory of the text tokenizer's files."""
        return self.path / native.RELEASED

    def load_params(self, mesh=None, param_dtype=None, parts=None, check_finite=True) -> dict[str, Any]:
        """Loads parameters; see `ReleasedCheckpoint.load_params`."""
        wanted = chosen(abstract_params(self.config), parts)
        return native.load_native(self.path, wanted, mesh, param_dtype, check_finite)

    def origin(self) -> native.Origin:
        """Returns what is needed to export a model derived from this one."""
        return native.read_origin(self.path)


Checkpoint = ReleasedCheckpoint | NativeCheckpoint


def open_checkpoint(
    path: Path, image_tokenizer: Path | None = None, diffusion: Path | None = None, backbone: str | None = None
) -> Checkpoint:
    """Opens a checkpoint, reading headers and configurations but no weights.

    Args:
      path: directory in the native or released layout, or `hf://org/name`.
      image_tokenizer: `ta_tok.pth`, for a released checkpoint without an image tokenizer.
      diffusion: diffusers folder of SANA-1.5, for a released checkpoint without diffusion models.
      backbone: `package.module:attribute` of the diffusion backbone, if it is from another package. It must be given,
        since opening a checkpoint must not import code that the user has not named.

    Raises:
      UserError: not a checkpoint, or one that lacks parts.
    """
    directory = hub.local_path(path, hub.CHECKPOINT_FILES)
    if (directory / native.META).exists():
        for name, value in (("image_tokenizer", image_tokenizer), ("diffusion", diffusion)):
            got = f"{value} with {directory}, which has every part"
            require(value is None, name, got, "this only for checkpoints that lack a part", "leave it out")
        identity = native.read_meta(directory).typed(str, "id")
        return NativeCheckpoint(directory, native.read_config(directory, backbone), identity)
    weight_files.check_no_adapter(directory)
    _check_no_run(directory)
    what, expected = f"{directory}: neither {native.META} nor config.json", "the directory of a checkpoint"
    require((directory / "config.json").exists(), what, None, expected, "correct the path")
    if image_tokenizer is not None:
        image_tokenizer = hub.local_path(image_tokenizer, hub.IMAGE_TOKENIZER_FILES)
    if diffusion is not None:
        diffusion = hub.local_path(diffusion, hub.DIFFUSION_FILES)
    return released.open_released(directory, image_tokenizer, diffusion)


def _check_no_run(directory: pathlib.Path) -> None:
    """Raises UserError for the working directory of train.py, which has a config.json of its own."""
    if not ((directory / "config.json").exists() and (directory / "checkpoints").is_dir()):
        return
    do = "finish the run, which then writes its model"
    if (directory / "adapter").is_dir():
        do = f"give its base, and {directory / 'adapter'} as --adapter"
    elif (directory / "model").is_dir():
        do = f"give {directory / 'model'}"
    raise UserError(f"{directory}: the working directory of a run", expected="the directory of a checkpoint", do=do)


def check_backbone(checkpoint: Checkpoint, named: str | None) -> None:
    """Raises UserError if `named` is a backbone other than the checkpoint's."""
    own = checkpoint.config.dit.name
    require(named in (None, own), "backbone", named, f"{own}, the backbone of {checkpoint.path}", "leave it out")


def import_checkpoint(checkpoint: ReleasedCheckpoint, target: pathlib.Path, check_finite: bool = True) -> engine.Plan:
    """Writes a released checkpoint in the native layout, keeping dtypes; returns the plan of its tensors.

    Raises:
      UserError: the directory exists or cannot be written, tensors do not fit, or weights are not finite.
    """
    check_target(target)
    plan = checkpoint.plan()
    params = engine.load(plan, checkpoint.source, check_finite=check_finite)
    native.save_native(target, checkpoint.config, params, checkpoint.origin())
    return plan
