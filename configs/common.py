"""Sections that configurations share, as functions."""

import ml_collections
from ml_collections import config_dict

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.schema import to_dict


def placeholder(kind: type):
    """A setting that may stay None and takes values of `kind`."""
    return config_dict.placeholder(kind)


def base(objective: str, num_steps: int, model: Blip3oConfig | None = None) -> ml_collections.ConfigDict:
    """Every section with its defaults; a stage fills in data, row, trainable and its settings.

    Args:
      model: geometry of a run from scratch; None: that of the checkpoint that `init_from` names.
    """
    config = ml_collections.ConfigDict()
    config.objective = objective
    config.settings = ml_collections.ConfigDict()
    if model is not None:
        config.model = ml_collections.ConfigDict(to_dict(model))
    config.init_from = placeholder(str)
    config.tokenizer = placeholder(str)
    config.mesh = ml_collections.ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})
    config.numerics = ml_collections.ConfigDict(
        {"dtype": "bfloat16", "frozen_dtype": "bfloat16", "remat": "none", "unroll": False}
    )
    config.loop = ml_collections.ConfigDict(
        {"num_steps": num_steps, "seed": 0, "log_every": 10, "save_every": 1000, "keep": 3, "keep_best": 0,
         "tensorboard": True, "wandb_project": placeholder(str), "profile_start": placeholder(int)}
    )  # fmt: skip
    config.optimizer = ml_collections.ConfigDict(
        {
            "learning_rate": 5e-5,
            "min_learning_rate": 1e-5,
            "warmup_steps": (config.loop.get_ref("num_steps") + 99) // 100,  # 1 %, also of a number given later
            "clip_norm": 1.0,
            "weight_decay": 0.0,
            "accumulation": 1,
            "ema_decay": placeholder(float),
        }
    )
    config.export_every = 0
    config.export_ema = False
    return config


def data(sources: tuple[dict, ...] | dict[str, dict], batch_size: int, **options) -> ml_collections.ConfigDict:
    """The data section: sources are dictionaries of `data.config.SourceConfig`.

    Named ones can be changed on a command line: `--config.data.sources.NAME.path=...`.
    """
    return ml_collections.ConfigDict({"sources": sources, "batch_size": batch_size, **options})


def source(kind: str, task: str = "t2i", weight: float = 1.0, **options) -> dict:
    """A named data source whose path is to be given on the command line."""
    return {"kind": kind, "path": placeholder(str), "task": task, "weight": weight, "options": options}


def row(length: int, **options) -> ml_collections.ConfigDict:
    """Shape of a training row."""
    return ml_collections.ConfigDict({"length": length, **options})


# What trains, as ordered rules over parameter paths; the first that matches decides (SPEC of the released recipes).
DECODER_AND_CAPTIONS = (
    (r"^decoder/", True),
    (r"^connector/", True),
    (r"^dit/caption_(projection|norm)/", True),
    (r"", False),
)
EDITING = (
    (r"^(vae|siglip)_connector/", True),
    (r"^dit/(patch_embed|proj_out)/", True),  # the noise space takes the reference's latent
    *DECODER_AND_CAPTIONS,
)
DECODER_CONNECTORS_AND_DIT = (
    (r"^(decoder|connector|vae_connector|siglip_connector|dit)/", True),
    (r"", False),
)
CONNECTORS_AND_DIT = ((r"^decoder/", False), *DECODER_CONNECTORS_AND_DIT)
DECODER = ((r"^decoder/", True), (r"", False))
DIT = ((r"^dit/", True), (r"", False))
DECODER_AND_DIT = ((r"^(decoder|dit)/", True), (r"", False))
AUTOENCODER = ((r"^(autoencoder|discriminator)/", True), (r"", False))
IMAGE_TOKENIZER = ((r"^(image_tokenizer|pixel_head)/", True), (r"", False))
IMAGE_TOKENIZER_WITHOUT_CODES = ((r"^image_tokenizer/quantizer/embedding/", False), *IMAGE_TOKENIZER)
