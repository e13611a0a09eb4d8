"""Assembles a model for training from published parts: Qwen3, SANA, DC-AE and TA-Tok.

The parts are combined under the names of a released checkpoint, and the conversion tables verify that none is missing.
Connectors and the embedding rows of new tokens (`embedding_rows`) are initialised.

Source: BLIP3o-NEXT `initialize_vision_modules`, `initialize_vision_tokenizer` and `train`.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping

import flax.linen as nn
import jax
import numpy as np

from blip3o_jax.config import Blip3oConfig, TokenIds
from blip3o_jax.config.schema import differences
from blip3o_jax.convert import embedding_rows, engine, hub, native, released, weight_files
from blip3o_jax.convert.fields import Fields
from blip3o_jax.convert.generations import check_generations, config_for_both, rope_theta
from blip3o_jax.convert.released_config import TOKENS, read_config
from blip3o_jax.convert.released_write import DIFFUSION_FOLDER, fields_of, write_config
from blip3o_jax.convert.sources import TensorInfo, TensorSource, combined, in_memory
from blip3o_jax.convert.staging import check_target
from blip3o_jax.convert.tables import (
    AUTOENCODER_PREFIX,
    DIT_PREFIX,
    EMBEDDING_KEY,
    HEAD_KEY,
    IMAGE_TOKENIZER_PREFIX,
    PARTS,
)
from blip3o_jax.errors import UserError, require
from blip3o_jax.models import blip3o
from blip3o_jax.text.tokenizer import Tokenizer
from blip3o_jax.treepath import flatten

NUM_SCALES = 3
FRESH = ("connector", "vae_connector", "siglip_connector")
CODEBOOK = "bottleneck.regularizer."


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Paths of the parts: directories, or `hf://org/name`."""

    decoder: str  # Qwen3: config.json, weights, tokenizer
    diffusion: str  # SANA-1.5 in diffusers' layout: transformer/, scheduler/, vae/
    image_tokenizer: str  # ta_tok.pth, which includes the vision tower
    autoencoder: str | None = None  # DC-AE in diffusers' layout; None: vae/ of `diffusion`


@dataclasses.dataclass(frozen=True)
class Assembled:
    """The result of `assemble`."""

    config: Blip3oConfig
    plan: engine.Plan
    info: Mapping[str, TensorInfo]  # of all tensors, including new ones
    kept_rows: int  # rows of Qwen3's embedding


def assemble(
    pieces: Pieces,
    target: pathlib.Path,
    geometry: Blip3oConfig | None = None,
    project_codebook: bool = False,
    seed: int = 0,
) -> Assembled:
    """Writes a checkpoint in the native layout.

    Args:
      geometry: required geometry, and the editing mode; None: that of the parts, without editing.
      project_codebook: initialise the rows of image codes from the tokenizer's codebook instead of the mean row.

    Raises:
      UserError: parts are missing, damaged or do not fit together, or the directory exists or cannot be written.
    """
    check_target(target)
    with tempfile.TemporaryDirectory() as name, _originals(pathlib.Path(name), pieces):
        folder = pathlib.Path(name)
        tokenizer, args = _image_tokenizer(pieces.image_tokenizer, folder)
        names = ("embedding.weight", "embedding_proj.weight", "embedding_proj.bias")
        tables = [tokenizer[CODEBOOK + name].read() for name in names] if project_codebook else None
        codebook = tables and embedding_rows.effective_codebook(*tables)
        num_codes = tokenizer[CODEBOOK + "embedding.weight"].shape[0]
        decoder, tied, kept_rows = _decoder(pieces.decoder, folder, num_codes, codebook, seed)
        parts = combined([("", decoder), (IMAGE_TOKENIZER_PREFIX, tokenizer), *_diffusion(pieces, folder)])
        config = _checked(read_config(folder, parts, tied, args, folder / DIFFUSION_FOLDER), geometry)
        source = combined([("", parts), ("", _connectors(config, seed))])
        write_config(config, folder)
        plan = engine.plan(blip3o.abstract_params(config), source, PARTS, where="the assembled parts")
        dtypes = {key: tensor.dtype for key, tensor in source.items()}
        origin = native.Origin(native.files_below(folder), unused=plan.unused, source=source, dtypes=dtypes)
        native.save_native(target, config, engine.load(plan, source), origin)
        return Assembled(config, plan, source, kept_rows)


@contextlib.contextmanager
def _originals(folder: pathlib.Path, pieces: Pieces) -> Iterator[None]:
    """Replaces the paths of copies in `folder` by the user's paths in the message of a UserError."""
    diffusion, beside = folder / DIFFUSION_FOLDER, pathlib.Path(pieces.image_tokenizer)
    beside = beside if beside.is_dir() else beside.parent
    copies = {
        diffusion / "vae": pieces.autoencoder or f"{pieces.diffusion}/vae",
        diffusion: pieces.diffusion,
        **{folder / name: beside / name for name in hub.IMAGE_TOKENIZER_CONFIGS},
        folder: pieces.decoder,
    }
    try:
        yield
    except UserError as error:
        message = str(error)
        for copy, original in copies.items():
            message = message.replace(str(copy), str(original))
        error.args = (message,)
        raise


def _decoder(
    path: str, folder: pathlib.Path, num_codes: int, codebook: np.ndarray | None, seed: int
) -> tuple[TensorSource, bool, int]:
    """Opens Qwen3 with an extended vocabulary; writes its configuration and tokenizer to `folder`.

    Returns:
      Its tensors, whether the output head is tied, and the number of embedding rows that are kept.
    """
    directory = hub.local_path(path, hub.CHECKPOINT_FILES)
    weight_files.check_no_adapter(directory)
    values = Fields(directory / "config.json")
    kind, expected = values.get("model_type"), "a Qwen3 model, config.json beside model.safetensors"
    require(kind == "qwen3", directory, f"model_type {kind!r}", expected, "pass such a directory")
    main = weight_files.unwrapped(weight_files.open_weights(directory), EMBEDDING_KEY, directory)
    check_generations(values)
    rope_theta(values)
    tied, _ = released.tied_head(directory, values, main)
    tables = (EMBEDDING_KEY,) if tied else (EMBEDDING_KEY, HEAD_KEY)
    ids = _write_tokenizer(directory, folder, num_codes)
    settings = {**config_for_both(values), **_settings(ids, tied)}
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    generator = np.random.default_rng(seed)
    longer = {key: embedding_rows.extend_table(main[key].read(), ids, generator, codebook) for key in tables}
    rest = {key: tensor for key, tensor in main.items() if key not in (EMBEDDING_KEY, HEAD_KEY)}
    kept_rows = min(main[EMBEDDING_KEY].shape[0], ids.image_end_tag + 1)
    return in_memory(longer, f"longer tables of {directory}") | rest, tied, kept_rows


def _image_tokenizer(path: str, folder: pathlib.Path) -> tuple[TensorSource, Mapping | None]:
    """Returns tensors and arguments; copies the configurations beside them to `folder`."""
    local = hub.local_path(path, hub.IMAGE_TOKENIZER_FILES)
    beside = local if local.is_dir() else local.parent
    for name in hub.IMAGE_TOKENIZER_CONFIGS:
        if (beside / name).exists():
            shutil.copyfile(beside / name, folder / name)
    return released.open_image_tokenizer(local)


def _diffusion(pieces: Pieces, folder: pathlib.Path) -> list[tuple[str, TensorSource]]:
    """Opens the transformer and the autoencoder, and copies their configurations to `folder`."""
    sana = hub.local_path(pieces.diffusion, hub.DIFFUSION_FILES)
    places = {DIT_PREFIX: ("transformer", sana / "transformer"), AUTOENCODER_PREFIX: ("vae", sana / "vae")}
    if pieces.autoencoder is not None:
        places[AUTOENCODER_PREFIX] = ("vae", hub.local_path(pieces.autoencoder, ("*.json", "*.safetensors", "*.bin")))
    parts = []
    for prefix, (name, place) in places.items():
        expected, do = f"the {name} in diffusers' layout", "correct --diffusion or --autoencoder"
        require((place / "config.json").exists(), f"{place}: no config.json", None, expected, do)
        parts.append((prefix, released.open_diffusion(place, prefix)))
        (folder / DIFFUSION_FOLDER / name).mkdir(parents=True)
        shutil.copyfile(place / "config.json", folder / DIFFUSION_FOLDER / name / "config.json")
    scheduler = sana / "scheduler" / "scheduler_config.json"
    if scheduler.exists():
        (folder / DIFFUSION_FOLDER / "scheduler").mkdir()
        shutil.copyfile(scheduler, folder / DIFFUSION_FOLDER / "scheduler" / scheduler.name)
    return parts


def _write_tokenizer(decoder: pathlib.Path, folder: pathlib.Path, num_codes: int) -> TokenIds:
    """Writes the text tokenizer with the added tokens, in the order of the released models; returns their ids."""
    tokenizer = Tokenizer.from_directory(decoder)
    has_tag = tokenizer.token_to_id("<im_start>") is not None
    require(not has_tag, f"{decoder}: its tokenizer", "<im_start>", "a raw Qwen3's", "pass such a directory")
    first = tokenizer.vocab_size
    tokenizer.add_image_tokens(NUM_SCALES, num_codes)
    ids = TokenIds(first, first + 1, first + 2, NUM_SCALES, first + 2 + NUM_SCALES, num_codes, tokenizer.pad_id)
    got = [tokenizer.token_to_id(token) for token in ("<im_start>", "<S0>", "<I0>", f"<I{num_codes - 1}>")]
    expected = [first, ids.scale_start, ids.image_start, ids.image_start + num_codes - 1]
    require(got == expected, f"{decoder}: ids of added tokens", got, expected, "pass a raw Qwen3's tokenizer")
    tokenizer.save(folder)
    return ids


def _settings(ids: TokenIds, tied: bool) -> dict:
    """Returns the fields of config.json that differ from Qwen3's."""
    return {
        "model_type": "blip3o_qwen",
        "architectures": ["blip3oQwenForCausalLM"],
        "tie_word_embeddings": tied,
        "vocab_size": ids.image_start + ids.num_image_tokens,
        **fields_of(TOKENS, ids),
        "pad_token_id": ids.pad,
    }


def _checked(config: Blip3oConfig, geometry: Blip3oConfig | None) -> Blip3oConfig:
    """Returns the configuration with the editing mode of `geometry`; all else but the schedule must be equal."""
    if geometry is None:
        return config
    config = dataclasses.replace(config, edit=geometry.edit)
    for name, (got, expected) in differences(config, dataclasses.replace(geometry, schedule=config.schedule)).items():
        do = "choose another preset, or leave it out"
        raise UserError(f"--preset: the parts differ from it in {name}", got=got, expected=expected, do=do)
    return config


def _connectors(config: Blip3oConfig, seed: int) -> TensorSource:
    """Initialises the connectors; returns them under their released names."""
    makers = {name: make for name, make in blip3o.initializers(config).items() if name in FRESH}
    keys = jax.random.split(jax.random.key(seed), len(makers))
    params = {name: nn.meta.unbox(jax.jit(make)(key)) for (name, make), key in zip(makers.items(), keys)}
    leaves = flatten(params)
    abstract = {name: blip3o.abstract_params(config)[name] for name in makers}
    return engine.export_tensors(engine.expand(abstract, PARTS), lambda path: np.asarray(leaves[path]), dtypes={})
