"""Opens a checkpoint in the layout of the released ones: finds every part, wherever it lies, and its configuration.

`model.safetensors` or its shards hold all parts in most uploads. Where the image tokenizer or the diffusion models are
missing there, they are taken from `ta_tok.pth` and from a diffusers folder, named by the caller or by config.json.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.convert import safetensors_io, torch_pickle
from blip3o_jax.convert.released_config import read_config, read_json
from blip3o_jax.convert.sources import Combined, TensorSource
from blip3o_jax.convert.tables import AUTOENCODER_PREFIX, DIT_PREFIX, EMBEDDING_KEY, HEAD_KEY, IMAGE_TOKENIZER_PREFIX
from blip3o_jax.errors import UserError

COMPARED_ROWS = 4096  # of the embedding and the head at a time
DIFFUSION_WEIGHTS = "diffusion_pytorch_model"
DIFFUSION_CONFIGS = ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
COMPANION_SUFFIXES = (".json", ".txt", ".jinja", ".md", ".model")  # tokenizer, configurations, model card
SAMPLES, SAMPLE_BYTES = 64, 4096  # of every weight file, for the fingerprint


@dataclasses.dataclass(frozen=True)
class Released:
    """A checkpoint in the released layout.

    Attributes:
      directory: of config.json and the tokenizer's files.
      config: of the model.
      source: every tensor, under the names of a complete checkpoint.
      aliases: tensors that repeat another one -> that one (a tied output head that is stored all the same).
      diffusion: folder of the diffusion models' configurations; None: as published.
      tokenizer_args: of the image tokenizer, where they came with its weights.
    """

    directory: pathlib.Path
    config: Blip3oConfig
    source: TensorSource
    aliases: Mapping[str, str]
    diffusion: pathlib.Path | None = None
    tokenizer_args: Mapping[str, Any] | None = None


def is_released(directory: pathlib.Path) -> bool:
    """Whether a directory looks like a checkpoint in the released layout."""
    return (directory / "config.json").exists()


def open_released(
    directory: pathlib.Path, image_tokenizer: pathlib.Path | None = None, diffusion: pathlib.Path | None = None
) -> Released:
    """Finds the parts of a checkpoint; reads headers and configurations only (and the output head, if there is one).

    Args:
      directory: holds config.json and the weights.
      image_tokenizer: `ta_tok.pth`, or a directory with it, for checkpoints without an image tokenizer.
      diffusion: a diffusers folder of SANA, for checkpoints without diffusion models or their configurations.

    Raises:
      UserError: not such a checkpoint, or parts are missing.
    """
    values = read_json(directory / "config.json")
    main = safetensors_io.open_weights(directory)
    if main is None:
        raise UserError(
            f"{directory}: no model.safetensors and no model.safetensors.index.json",
            expected="the weights beside config.json",
            do="fetch the checkpoint again",
        )
    if image_tokenizer is not None and _has(main, IMAGE_TOKENIZER_PREFIX):
        raise UserError(
            "image_tokenizer",
            got=f"{image_tokenizer} although {directory} has one",
            expected="it with checkpoints that lack it",
            do="leave it out",
        )
    image_tokenizer = image_tokenizer or _named_file(directory, values.get("mm_vision_tower"))
    diffusion = diffusion or named_folder(directory, values.get("diffusion_name_or_path"))
    source, tokenizer_args = _all_parts(directory, main, image_tokenizer, diffusion)
    tied, aliases = tied_head(directory, values, source)
    config = read_config(directory, source.info, tied, tokenizer_args, diffusion)
    return Released(directory, config, source, aliases, diffusion, tokenizer_args)


def open_image_tokenizer(path: pathlib.Path) -> tuple[TensorSource, Mapping[str, Any] | None]:
    """Tensors of a `ta_tok.pth` and the arguments it was made with.

    Args:
      path: the file, or a directory that holds ta_tok.pth.

    Raises:
      UserError: not such a file.
    """
    path = path / "ta_tok.pth" if path.is_dir() else path
    content = torch_pickle.read_pickle(path)
    model = content.get("model", content) if isinstance(content, Mapping) else None
    state = model.get("sd", model) if isinstance(model, Mapping) else None
    if not isinstance(state, Mapping) or "bottleneck.regularizer.embedding.weight" not in state:
        raise UserError(f"{path}: no image tokenizer in it", expected="ta_tok.pth of TA-Tok", do="correct the path")
    args = model.get("args") if state is not model else None
    return torch_pickle.open_state_dict(path, dict(state)), args if isinstance(args, Mapping) else None


def _all_parts(
    directory: pathlib.Path, main: TensorSource, image_tokenizer: pathlib.Path | None, diffusion: pathlib.Path | None
) -> tuple[TensorSource, Mapping[str, Any] | None]:
    """Everything in one source, and the image tokenizer's arguments where it was taken from its own file."""
    parts: list[tuple[str, TensorSource]] = [("", main)]
    arguments, missing = None, []
    if not _has(main, IMAGE_TOKENIZER_PREFIX):
        if image_tokenizer is None:
            missing.append("the image tokenizer (--image_tokenizer with the path of ta_tok.pth)")
        else:
            tokenizer, arguments = open_image_tokenizer(image_tokenizer)
            parts.append((IMAGE_TOKENIZER_PREFIX, tokenizer))
    for prefix, folder, name in (
        (DIT_PREFIX, "transformer", "the diffusion transformer"),
        (AUTOENCODER_PREFIX, "vae", "the autoencoder"),
    ):
        if not _has(main, prefix):
            weights = safetensors_io.open_weights(diffusion / folder, DIFFUSION_WEIGHTS) if diffusion else None
            if weights is None:
                missing.append(f"{name} (--diffusion with a SANA-1.5 folder that has {folder}/)")
            else:
                parts.append((prefix, weights))
    if missing:
        raise UserError(
            f"{directory}: its weights lack {' and '.join(missing)}", expected="every part", do="pass what is missing"
        )
    return Combined(parts), arguments


def _has(source: TensorSource, prefix: str) -> bool:
    return any(key.startswith(prefix) for key in source.info)


def named_folder(directory: pathlib.Path, name: Any) -> pathlib.Path | None:
    """The folder that config.json names, if it is there; a hub id is not."""
    if not isinstance(name, str) or not name:
        return None
    folder = directory / name  # an absolute name stays absolute
    return folder if folder.is_dir() else None


def _named_file(directory: pathlib.Path, name: Any) -> pathlib.Path | None:
    if not isinstance(name, str) or not name:
        return None
    return directory / name if (directory / name).is_file() else None


def tied_head(directory: pathlib.Path, values: Mapping[str, Any], source: TensorSource) -> tuple[bool, dict[str, str]]:
    """Whether the output head is the embedding, and the alias where it is stored nevertheless.

    Args:
      directory: for messages.
      values: of config.json.
      source: the checkpoint's tensors.

    Raises:
      UserError: a head of its own is announced and missing.
    """
    tied = bool(values.get("tie_word_embeddings", True))
    if HEAD_KEY not in source.info:
        if not tied:
            raise UserError(
                f"{directory}: no {HEAD_KEY} although config.json says tie_word_embeddings false",
                expected="it",
                do="fetch the checkpoint again",
            )
        return True, {}
    if tied and EMBEDDING_KEY in source.info and _equal(source, HEAD_KEY, EMBEDDING_KEY):
        return True, {HEAD_KEY: EMBEDDING_KEY}
    return False, {}


def _equal(source: TensorSource, first: str, second: str) -> bool:
    if source.info[first] != source.info[second]:
        return False
    a, b = (source.read(key) for key in (first, second))
    bits = np.dtype(f"u{a.itemsize}")
    starts = range(0, a.shape[0], COMPARED_ROWS)
    rows = (slice(start, start + COMPARED_ROWS) for start in starts)
    same = all(np.array_equal(a[part].view(bits), b[part].view(bits)) for part in rows)
    source.release(first)
    source.release(second)
    return same


def fingerprint(released: Released) -> str:
    """Twelve hex digits of the configuration and of samples of every weight file: tells checkpoints apart, cheaply."""
    digest = hashlib.sha256((released.directory / "config.json").read_bytes())
    files = sorted({released.source.origin(key) for key in released.source.info})
    for name in files:
        size = pathlib.Path(name).stat().st_size
        digest.update(f"{size}".encode())
        with open(name, "rb") as file:
            for i in range(SAMPLES):
                file.seek(i * max(size - SAMPLE_BYTES, 0) // max(SAMPLES - 1, 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:12]


def companions(released: Released) -> tuple[dict[str, pathlib.Path], dict[str, str]]:
    """Files that go with the weights: relative name -> file, and relative name -> contents of what is no copy.

    Configurations that lie outside the directory are brought in, and config.json then names them.
    """
    root, folder = released.directory, released.diffusion
    files = {path.name: path for path in sorted(root.iterdir()) if path.is_file() and _is_companion(path.name)}
    texts = {}
    if released.tokenizer_args is not None and "ta_tok_args.json" not in files:
        texts["ta_tok_args.json"] = json.dumps(released.tokenizer_args, indent=1) + "\n"
    if folder is None:
        return files, texts
    inside = folder.resolve().is_relative_to(root.resolve())
    place = folder.resolve().relative_to(root.resolve()) if inside else pathlib.Path("diffusion")
    files.update({str(place / name): folder / name for name in DIFFUSION_CONFIGS if (folder / name).exists()})
    if not inside:
        values = {**read_json(files.pop("config.json")), "diffusion_name_or_path": str(place)}
        texts["config.json"] = json.dumps(values, indent=1) + "\n"
    return files, texts


def _is_companion(name: str) -> bool:
    if name.startswith(".") or name.endswith(".index.json"):
        return False
    return name.endswith(COMPANION_SUFFIXES) or name.upper().startswith(("LICENSE", "NOTICE"))
