"""Opens a checkpoint in either layout.

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
from blip3o_jax.convert.tables import abstract_of, chosen
from blip3o_jax.errors import UserError, require

Path = str | pathlib.Path


@dataclasses.dataclass(frozen=True)
class NativeCheckpoint:
    """A checkpoint in the native layout; see `ReleasedCheckpoint`."""

    path: pathlib.Path
    config: Blip3oConfig
    identity: str

    @property
    def tokenizer_dir(self) -> pathlib.Path:
        return self.path / native.RELEASED

    def load_params(self, mesh=None, param_dtype=None, parts=None, check_finite=True) -> dict[str, Any]:
        wanted = chosen(abstract_of(self.config), parts)
        return native.load_native(self.path, wanted, mesh, param_dtype, check_finite)

    def origin(self) -> native.Origin:
        return native.read_origin(self.path)


Checkpoint = ReleasedCheckpoint | NativeCheckpoint


def open_checkpoint(
    path: Path, image_tokenizer: Path | None = None, diffusion: Path | None = None, backbone: str | None = None
) -> Checkpoint:
    """Opens a checkpoint; reads headers and configurations, no weights.

    Args:
      path: directory in the native layout or the released one, or `hf://org/name`.
      image_tokenizer: `ta_tok.pth` for a released checkpoint without an image tokenizer.
      diffusion: diffusers folder of SANA-1.5 for one without diffusion models.
      backbone: `package.module:attribute` of a diffusion backbone from outside the package, for a checkpoint that has
        it: a checkpoint alone never makes us import code.

    Raises:
      UserError: not a checkpoint, or one that lacks parts.
    """
    directory = hub.local_path(path, hub.CHECKPOINT_FILES)
    if native.is_native(directory):
        for name, value in (("image_tokenizer", image_tokenizer), ("diffusion", diffusion)):
            if value is not None:
                raise UserError(
                    name,
                    got=f"{value} with {directory}, which has every part",
                    expected="this only for checkpoints that lack a part",
                    do="leave it out",
                )
        identity = native.read_meta(directory).typed(str, "id")
        return NativeCheckpoint(directory, native.read_config(directory, backbone), identity)
    weight_files.check_no_adapter(directory)
    if not released.is_released(directory):
        raise UserError(
            f"{directory}: neither {native.META} nor config.json",
            expected="the directory of a checkpoint",
            do="correct the path",
        )
    if image_tokenizer is not None:
        image_tokenizer = hub.local_path(image_tokenizer, hub.IMAGE_TOKENIZER_FILES)
    if diffusion is not None:
        diffusion = hub.local_path(diffusion, hub.DIFFUSION_FILES)
    return released.open_released(directory, image_tokenizer, diffusion)


def check_backbone(checkpoint: Checkpoint, named: str | None) -> None:
    """Raises UserError where a user names another backbone than the checkpoint has."""
    own = checkpoint.config.dit.name
    require(named in (None, own), "backbone", named, f"{own}, the backbone of {checkpoint.path}", "leave it out")


def import_checkpoint(checkpoint: ReleasedCheckpoint, target: pathlib.Path, check_finite: bool = True) -> engine.Plan:
    """Writes a released checkpoint in the native layout, in the types it has.

    Returns:
      What became of every tensor.
    """
    check_target(target)
    plan = checkpoint.plan()
    params = engine.load(plan, checkpoint.source, check_finite=check_finite)
    native.save_native(target, checkpoint.config, params, checkpoint.origin(), checkpoint.identity)
    return plan
