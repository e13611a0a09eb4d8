"""Every stage on a model of a few layers, each under a minute on two CPU cores: the tutorial, and a test.

python train.py --config=configs/tiny.py:STAGE --workdir=runs/tiny-STAGE

STAGE is vae, tokenizer, pretrain (the default), sft, edit or steps. Each runs from scratch; to chain them, add
--config.init_from=runs/tiny-BEFORE/model. The model is too small for useful images, but its losses fall.
"""

import dataclasses
import pathlib

import blip3o_jax
from blip3o_jax.config import EditConfig
from blip3o_jax.config.presets import preset
from blip3o_jax.errors import UserError
from configs import common

TOKENIZER = pathlib.Path(blip3o_jax.__file__).parent / "assets" / "tiny"
SIDE = 32  # pixels
TINY = dataclasses.replace(preset("tiny"), image_size=SIDE)
TINY_EDIT = dataclasses.replace(TINY, edit=EditConfig(vae_condition=True, vae_noise=True))


def world(task: str, split: str = "train", weight: float = 1.0) -> dict:
    """The demo world as a data source."""
    return {"kind": "world", "path": split, "task": task, "weight": weight, "options": {"size": SIDE}}


def get_config(stage: str = "pretrain"):
    """The configuration of a stage."""
    stages = {"vae": _vae, "tokenizer": _tokenizer, "pretrain": _pretrain, "sft": _sft, "edit": _edit, "steps": _steps}
    if stage not in stages:
        raise UserError("configs/tiny.py", got=f"{stage!r}", expected=f"one of {', '.join(stages)}", do="choose one")
    config = stages[stage]()
    config.tokenizer = str(TOKENIZER)
    config.numerics.dtype = config.numerics.frozen_dtype = "float32"
    config.optimizer.update({"learning_rate": 2e-3, "min_learning_rate": 1e-4, "warmup_steps": 3})
    config.loop.update({"log_every": 1, "save_every": 10})
    return config


def _vae():
    config = common.base("autoencoder", 30, TINY)
    config.trainable = common.AUTOENCODER
    config.data = common.data((world("t2i"),), 8)
    config.row = common.row(length=0)
    return config


def _tokenizer():
    config = common.base("tokenizer", 30, TINY)
    config.settings = {"pixels": {}, "pool_scales": (1, 2), "codebook_from_data": True}
    config.trainable = common.IMAGE_TOKENIZER
    config.data = common.data((world("t2i"),), 8)
    config.row = common.row(length=0)
    return config


def _pretrain():
    config = common.base("joint", 30, TINY)
    config.trainable = common.DECODER_CONNECTORS_AND_DIT
    config.data = common.data((world("t2i"),), 8)
    config.row = common.row(length=160)
    config.validation = {"data": common.data((world("t2i", "held_out"),), 8), "every": 10, "batches": 2}
    return config


def _sft():
    config = _pretrain()
    config.trainable = common.DECODER_AND_CAPTIONS
    config.row.loss_on = "assistant"
    return config


def _edit():
    config = common.base("joint", 30, TINY_EDIT)
    config.trainable = common.EDITING
    config.data = common.data((world("t2i"), world("edit", weight=2.0), world("reconstruct")), 8)
    config.row = common.row(length=200, max_references=1)
    return config


def _steps():
    config = common.base("mean_flow", 30, TINY_EDIT)
    config.trainable = common.DIT
    config.data = common.data((world("t2i"), world("edit")), 8)
    config.row = common.row(length=200, max_references=1)
    return config
