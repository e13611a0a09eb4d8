"""Opens checkpoints in the released layout.

Most uploads have all parts in `model.safetensors` or its shards. A missing image tokenizer or missing diffusion models
are read from `ta_tok.pth` and from a diffusers folder, given by the caller or named in config.json.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax import files
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.convert import engine, identity, native, safetensors_io, torch_pickle, weight_files
from blip3o_jax.convert.fields import Fields
from blip3o_jax.convert.released_config import read_config
from blip3o_jax.convert.sources import TensorSource, combined
from blip3o_jax.convert.tables import (
    AUTOENCODER_PREFIX,
    DIT_PREFIX,
    EMBEDDING_KEY,
    HEAD_KEY,
    IMAGE_TOKENIZER_PREFIX,
    PARTS,
    chosen,
)
from blip3o_jax.errors import require
from blip3o_jax.models.blip3o import abstract_params
from blip3o_jax.sharding import shardings_of

COMPARED_ROWS = 4096  # rows of the embedding and the head that are compared at a time
DIFFUSION_WEIGHTS = "diffusion_pytorch_model"
DIFFUSION_PARTS = {  # prefix -> folder, name for messages, a tensor that all versions have
    DIT_PREFIX: ("transformer", "the diffusion transformer", "patch_embed.proj.weight"),
    AUTOENCODER_PREFIX: ("vae", "the autoencoder", "decoder.conv_in.weight"),
}
CODEBOOK_KEY = "bottleneck.regularizer.embedding.weight"
DIFFUSION_CONFIGS = ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
COMPANION_SUFFIXES = (".json", ".txt", ".jinja", ".md", ".model")  # tokenizer, configurations, model card


@dataclasses.dataclass(frozen=True)
class ReleasedCheckpoint:
    """A checkpoint in the released layout; has the interface of `checkpoint.NativeCheckpoint`."""

    path: pathlib.Path  # directory of config.json and the text tokenizer
    config: Blip3oConfig
    source: TensorSource  # all tensors, under the names of a complete checkpoint
    aliases: Mapping[str, str]  # tensor that duplicates another -> that one (a stored head that is tied)
    diffusion: pathlib.Path | None = None  # configurations of the diffusion models; None: the published geometry
    tokenizer_args: Mapping[str, Any] | None = None  # of the image tokenizer, if stored with its weights

    @property
    def tokenizer_dir(self) -> pathlib.Path:
        """Directory of the text tokenizer's files."""
        return self.path

    @functools.cached_property
    def identity(self) -> str:
        """Identity of the weights: twelve hex digits; reads a small part of every tensor."""
        sampled = identity.windows(self.config)
        values = {
            leaf.path: engine.read_window(leaf, sampled[leaf.path], self.source, leaf.dtype, check_finite=False)
            for leaf in self.plan().leaves
        }
        return identity.digest({path: identity.value_sum(value) for path, value in values.items()})

    def plan(self) -> engine.Plan:
        """Verifies the tensors and returns their assignment to parameters; raises UserError if they do not fit."""
        return engine.plan(abstract_params(self.config), self.source, PARTS, self.aliases, str(self.path))

    def load_params(
        self,
        mesh: Any = None,
        param_dtype: str | None = None,
        parts: Sequence[str] | None = None,
        check_finite: bool = True,
    ) -> dict[str, Any]:
        """Returns parameters as nested dictionaries of jax arrays on their devices, by part.

        Args:
          mesh: None: one device.
          param_dtype: dtype of the parameters; None: as stored.
          parts: parts to load; None: all.
          check_finite: raise on NaN and infinities.

        Raises:
          UserError: an unknown part, tensors that do not fit, or weights that are not finite.
        """
        plan, wanted = self.plan(), chosen(abstract_params(self.config), parts)
        leaves = tuple(leaf for leaf in plan.leaves if leaf.path.split("/")[0] in wanted)
        shardings = None if mesh is None else shardings_of(wanted, mesh)
        plan = dataclasses.replace(plan, leaves=leaves)
        return engine.load(plan, self.source, shardings, param_dtype, check_finite)

    def origin(self) -> native.Origin:
        """Returns what is needed to export a model derived from this one."""
        dtypes = {key: info.dtype for key, info in self.source.items()}
        copied, texts = _companions(self)
        return native.Origin(copied, texts, self.plan().unused, self.source, dtypes, self.aliases)


def open_released(
    directory: pathlib.Path, image_tokenizer: pathlib.Path | None = None, diffusion: pathlib.Path | None = None
) -> ReleasedCheckpoint:
    """Opens a checkpoint, reading headers and configurations, and no weights except a stored output head.

    Args:
      directory: contains config.json and the weights.
      image_tokenizer: `ta_tok.pth` or its directory, for a checkpoint without an image tokenizer.
      diffusion: diffusers folder of SANA, for a checkpoint without diffusion models or their configurations.

    Raises:
      UserError: another kind of checkpoint, or parts are missing.
    """
    values = Fields(directory / "config.json")
    main = weight_files.unwrapped(weight_files.open_weights(directory), EMBEDDING_KEY, directory)
    good = image_tokenizer is None or not _has(main, IMAGE_TOKENIZER_PREFIX)
    got = f"{image_tokenizer} although {directory} has one"
    require(good, "image_tokenizer", got, "this only for checkpoints without one", "leave it out")
    image_tokenizer = image_tokenizer or _named(directory, values, "mm_vision_tower", pathlib.Path.is_file)
    diffusion = diffusion or named_folder(directory, values)
    source, tokenizer_args = _all_parts(directory, main, image_tokenizer, diffusion)
    tied, aliases = tied_head(directory, values, source)
    config = read_config(directory, source, tied, tokenizer_args, diffusion)
    return ReleasedCheckpoint(directory, config, source, aliases, diffusion, tokenizer_args)


def open_image_tokenizer(path: pathlib.Path) -> tuple[TensorSource, Mapping[str, Any] | None]:
    """Opens `ta_tok.pth`, its directory, or a safetensors file; raises UserError for other files.

    Returns the tensors, and the tokenizer's arguments if they are in the file.
    """
    path = path / "ta_tok.pth" if path.is_dir() else path
    if path.suffix == ".safetensors":
        return weight_files.unwrapped(safetensors_io.open_file(path), CODEBOOK_KEY, path), None
    model = torch_pickle.read_pickle(path)
    if isinstance(model, Mapping):
        model = next((model[name] for name in ("model", "state_dict") if name in model), model)
    state = model.get("sd", model) if isinstance(model, Mapping) else None
    good = isinstance(state, Mapping) and any(str(key).endswith(CODEBOOK_KEY) for key in state)
    require(good, f"{path}: no image tokenizer in it", None, "ta_tok.pth of TA-Tok", "correct the path")
    args = model.get("args") if state is not model else None
    source = weight_files.unwrapped(torch_pickle.open_state_dict(path, dict(state)), CODEBOOK_KEY, path)
    return source, args if isinstance(args, Mapping) else None


def _all_parts(
    directory: pathlib.Path, main: TensorSource, image_tokenizer: pathlib.Path | None, diffusion: pathlib.Path | None
) -> tuple[TensorSource, Mapping[str, Any] | None]:
    """Returns all tensors in one source, and the image tokenizer's arguments if they are in its file."""
    parts: list[tuple[str, TensorSource]] = [("", main)]
    arguments, missing = None, []
    if not _has(main, IMAGE_TOKENIZER_PREFIX):
        _check_absent(directory, main, CODEBOOK_KEY, IMAGE_TOKENIZER_PREFIX)
        if image_tokenizer is None:
            missing.append("the image tokenizer (--image_tokenizer with the path of ta_tok.pth)")
        else:
            tokenizer, arguments = open_image_tokenizer(image_tokenizer)
            parts.append((IMAGE_TOKENIZER_PREFIX, tokenizer))
    for prefix, (folder, name, anchor) in DIFFUSION_PARTS.items():
        if not _has(main, prefix):
            _check_absent(directory, main, anchor, prefix)
            if diffusion is None or not weight_files.has_weights(diffusion / folder):
                instead = "" if diffusion is None else f"; {diffusion} has none"
                missing.append(f"{name} (--diffusion with a SANA-1.5 folder that has weights in {folder}/{instead})")
            else:
                parts.append((prefix, open_diffusion(diffusion / folder, prefix)))
    what = f"{directory}: its weights lack {' and '.join(missing)}"
    require(not missing, what, None, "every part", "pass what is missing")
    return combined(parts), arguments


def open_diffusion(folder: pathlib.Path, prefix: str) -> TensorSource:
    """Opens a diffusion model in diffusers' layout, with the tensor names that it has there.

    `prefix` is its key in DIFFUSION_PARTS. Raises UserError for no readable weights, or those of another model.
    """
    weights = weight_files.open_weights(folder, DIFFUSION_WEIGHTS)
    return weight_files.unwrapped(weights, DIFFUSION_PARTS[prefix][2], folder)


def _check_absent(directory: pathlib.Path, source: TensorSource, anchor: str, prefix: str) -> None:
    """Raises UserError if a part that lacks its prefix exists under another prefix."""
    found = next((key for key in source if key.endswith(f".{anchor}")), None)
    expected = f"the name {prefix}{anchor}"
    require(found is None, f"{directory}: tensor {found}", None, expected, "rename the part's tensors")


def _has(source: TensorSource, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in source)


def named_folder(directory: pathlib.Path, values: Mapping[str, Any]) -> pathlib.Path | None:
    """Returns the folder of the diffusion models named in config.json, or None if it does not exist (as for a hub id).

    Raises:
      UserError: the folder is outside the checkpoint; such files are read only if the user names them.
    """
    return _named(directory, values, "diffusion_name_or_path", pathlib.Path.is_dir)


def _named(
    directory: pathlib.Path, values: Mapping[str, Any], field: str, exists: Callable[[pathlib.Path], bool]
) -> pathlib.Path | None:
    name = values.get(field)
    if not isinstance(name, str) or not name.strip() or "\0" in name or not exists(directory / name):
        return None
    what = f"{directory / 'config.json'}: {field}"
    return files.contained(directory, files.inside(directory, name, what), what)


def tied_head(directory: pathlib.Path, values: Fields, source: TensorSource) -> tuple[bool, dict[str, str]]:
    """Returns whether the output head is tied to the embedding, and its alias if it is stored nevertheless.

    Raises:
      UserError: config.json says that the head is not tied, and it is missing.
    """
    tied = values.get("tie_word_embeddings", True)
    if HEAD_KEY not in source:
        what = f"{directory}: no {HEAD_KEY} although config.json says tie_word_embeddings false"
        require(tied, what, None, "an output head", "fetch the checkpoint again")
        return True, {}
    if tied and EMBEDDING_KEY in source and _equal(source, HEAD_KEY, EMBEDDING_KEY):
        return True, {HEAD_KEY: EMBEDDING_KEY}
    return False, {}


def _equal(source: TensorSource, first: str, second: str) -> bool:
    a, b = (source[key].read() for key in (first, second))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (x.view(f"u{x.itemsize}") for x in (a, b))
    rows = (slice(start, start + COMPARED_ROWS) for start in range(0, len(a), COMPARED_ROWS))
    same = all(np.array_equal(a[part], b[part]) for part in rows)
    source[first].release()
    source[second].release()
    return same


def _companions(released: ReleasedCheckpoint) -> tuple[dict[str, pathlib.Path], dict[str, str]]:
    """Returns the files beside the weights: relative path -> file to copy, and relative path -> contents to write.

    Configurations outside the directory are included, and config.json is changed to name them.
    """
    root, folder = released.path, released.diffusion
    named = [path for path in sorted(root.iterdir()) if path.is_file() and _is_companion(path.name)]
    copied = {path.name: files.contained(root, path, "file of a checkpoint") for path in named}
    texts = {}
    if released.tokenizer_args is not None and "ta_tok_args.json" not in copied:
        texts["ta_tok_args.json"] = json.dumps(released.tokenizer_args, indent=1) + "\n"
    if folder is None:
        return copied, texts
    inside = folder.resolve().is_relative_to(root.resolve())
    place = folder.resolve().relative_to(root.resolve()) if inside else pathlib.Path("diffusion")
    for name in DIFFUSION_CONFIGS:
        if (folder / name).exists():
            copied[str(place / name)] = files.contained(folder, folder / name, "file of the diffusion models")
    if not inside:
        values = files.read_json(copied.pop("config.json"), "configuration")
        texts["config.json"] = json.dumps({**values, "diffusion_name_or_path": str(place)}, indent=1) + "\n"
    return copied, texts


def _is_companion(name: str) -> bool:
    if name.startswith(".") or name.endswith(".index.json"):
        return False
    return name.endswith(COMPANION_SUFFIXES) or name.upper().startswith(("LICENSE", "NOTICE"))
