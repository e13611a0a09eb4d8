"""Your own images: a low-rank adapter that is trained on a folder of 20 to 2,000 of them.

python train.py --config=configs/customize.py --workdir=DIR --config.data.path=FOLDER [--config.data.subject=WORD]

Captions are `.txt` files beside the images, metadata.csv or metadata.jsonl; images without one have the subject word.
--config.data.kind=webdataset or jsonl reads shards or tables (docs/data.md).
Every tenth image is held out: `val_loss` is theirs, and DIR/samples/progress.png draws their captions as training goes
on. The adapter is written to DIR/adapter; the last lines say how to sample with it. docs/customize.md is the tutorial.

An adapter of a few images makes the model forget others. --config.data.prior.path=DIR/samples.jsonl mixes in samples of
sample.py that it is to keep (prior preservation, as in DreamBooth): data.prior.weight rows for every row of data.path.

The defaults are for the embedded model on CPU. For a larger one, on a GPU or TPU:
--config.init_from=CHECKPOINT --config.row.length=1024 --config.numerics.unroll=False --config.numerics.remat=full
--config.numerics.frozen_dtype=bfloat16 --config.optimizer.learning_rate=2e-4 --config.optimizer.min_learning_rate=2e-5
"""

import pathlib

import blip3o_jax
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.example import BrokenItem
from blip3o_jax.data.sources import open_source
from blip3o_jax.errors import UserError
from configs import common

EMBEDDED = pathlib.Path(blip3o_jax.__file__).parent / "assets" / "demo"
PREVIEWS = 8  # held-out captions that are drawn
BYTES = 3  # of a drawn caption per token of a row; longer ones hardly fit
FLAGS = {"data.sources[0].path": "data.path=FOLDER"}


def get_config():
    """The configuration; `complete` makes the sources of data.path and data.subject."""
    config = common.base("joint", 200)
    config.init_from = str(EMBEDDED)
    config.adapter = {"rank": 16, "alpha": 16.0, "rslora": False, "dora": False, "rules": ()}
    config.trainable = common.DECODER_CONNECTORS_AND_DIT
    config.settings = {"flow_draws": 2}
    config.numerics.update({"frozen_dtype": "float32", "unroll": True})
    config.optimizer.update({"learning_rate": 3e-3, "min_learning_rate": 3e-4, "warmup_steps": 20, "b2": 0.98})
    config.loop.update({"log_every": 20, "save_every": 100, "keep": 1})
    config.data = common.data((), 16, max_broken_share=0.2)
    config.data.kind = "folder"
    config.data.path = common.placeholder(str)
    config.data.subject = common.placeholder(str)
    config.data.prior = {"kind": "jsonl", "path": common.placeholder(str), "weight": 1.0}  # the folder has 1
    config.row = common.row(length=128, loss_on="assistant")
    config.validation = {"data": common.data((), 16, max_broken_share=0.2), "every": 100, "batches": 2}
    config.samples = {"prompts": (), "every": 100, "num_inference_steps": 20, "guidance_scale": 2.0}
    config.export_every = 100
    return config


def complete(config: dict) -> dict:
    """The sources and the previews of the folder; without one they are left unset, as for a plan."""
    kind, path, subject, prior = (config["data"].pop(name) for name in ("kind", "path", "subject", "prior"))
    if subject is not None and not subject.strip():
        raise UserError("data.subject", got=repr(subject), expected="a word", do="write one, or leave it out")
    if prior["path"] is None and prior != get_config().to_dict()["data"]["prior"]:
        raise UserError(
            "data.prior.path",
            got="none",
            expected="the images to keep",
            do="add --config.data.prior.path=FILE, or leave prior out",
        )
    parts = {part: {"kind": kind, "path": path, "caption": subject, "part": part} for part in ("train", "held_out")}
    config["data"]["sources"] = (parts["train"],) if prior["path"] is None else (parts["train"], prior)
    if path is None:
        config["validation"] = config["samples"] = None
        return config
    captions = _captions(parts["train"], path)
    if config["validation"]:
        config["validation"]["data"]["sources"] = (parts["held_out"],)
    if config["samples"] and not config["samples"]["prompts"]:
        longest = BYTES * config["row"]["length"]
        found = _captions(parts["held_out"], path), captions
        fitting = (tuple(text for text in part if len(text.encode()) <= longest) for part in found)
        config["samples"]["prompts"] = next(filter(None, fitting), captions)[:PREVIEWS]
    return config


def _captions(source: dict, path: str) -> tuple[str, ...]:
    """Different captions of a part, in order."""
    opened, found = open_source(SourceConfig(**source)), {}
    for index in range(len(opened)):
        try:
            found[opened[index].text] = None
        except BrokenItem:  # named in the quarantine once it is read for training
            continue
    captions = tuple(text for text in found if text)
    if not captions and source["part"] == "train":
        raise UserError(
            f"data.path {path}: no caption of any image",
            expected="a .txt beside every image, metadata.csv or metadata.jsonl",
            do="add them, or name what all images show: --config.data.subject=WORD",
        )
    return captions
