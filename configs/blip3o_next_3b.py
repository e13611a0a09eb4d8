"""The released models' recipes at their size: one stage of BLIP3o-NEXT 3B each, on 32 devices of 80 GB.

python train.py --config=configs/blip3o_next_3b.py:STAGE --workdir=DIR --config.init_from=CHECKPOINT \\
    --config.data.sources.NAME.path=PATH ...

STAGE is pretrain (the default), sft, edit, steps, tokenizer or vae. Data paths are not set; a missing one is named.
CHECKPOINT is the output of `python -m blip3o_jax.convert assemble` (pretrain), the model of the previous stage (sft,
edit, steps: WORKDIR/model), or a released checkpoint.

| stage | learning rate | batch | steps | trains | numbers from |
|---|---|---|---|---|---|
| pretrain | 1e-4 -> 1e-5 | 512 | 336,000 | decoder, connector, caption projection | project page |
| sft | 5e-5 -> 1e-5 | 128 | 7,000 | the same | project page |
| edit | 5e-5 -> 1e-5 | 192 | one epoch: set loop.num_steps | and the DiT's ends, VAE connector | training scripts |
| steps | 1e-5 -> 1e-6 | 128 | 10,000 | the DiT, distilled to four steps | ours, not run at this size |
| tokenizer | 1e-4 -> 1e-5 | 512 | 100,000 | TA-Tok but for the codebook's rows | losses of TA-Tok, the rest ours |
| vae | 5e-5 -> 1e-5 | 256 | 100,000 | autoencoder, discriminator | ours |

All of them: AdamW (0.9, 0.999), no decay, gradients clipped at 1, cosine behind a warm-up of 1 %, bfloat16 with float32
parameters where they train. `python -m blip3o_jax.plan --config=... --num_devices N` reports what a stage needs.

STAGE@MACHINE, such as pretrain@v5e-32, splits the same batch into as many micro-batches as the machine needs; machines
are v5e-32, v6e-32, v5p-32, h100-8 and h200-8. docs/machines.md has what each stage takes there.

STAGE-precomputed (pretrain, sft, edit, steps) reads the output of `python -m blip3o_jax.data precompute`: one directory
of ArrayRecord files per source, with codes and latents in place of images. Codes are then the nearest ones; from
images they are drawn at the tokenizer's temperature, as the reference trains.

Differs from the reference: rows hold 1152 (pretrain, sft) and 1792 (edit) positions where it holds up to 2048 before
images are put in; an edit has one reference, which its own noise space asks for.
"""

import difflib

from blip3o_jax.config.presets import preset
from blip3o_jax.errors import UserError
from configs import common

OF_8 = {"pretrain": 4, "edit": 2, "steps": 2, "tokenizer": 4, "vae": 4}
MACHINES = {"v5e-32": {}, "v6e-32": {}, "v5p-32": {}, "h100-8": OF_8, "h200-8": OF_8}
"""Stage -> micro-batches of its batch, where it takes more than one: 8 devices take as many rows at a time as 32."""

LENGTH = 1152  # 733 of the image, 29 of the template: captions of up to 390 tokens
EDIT_LENGTH = 1792  # a reference takes 731 more; instructions of up to 290 tokens


def get_config(stage: str = "pretrain"):
    """The configuration of a stage, on a machine or not."""
    stage, _, machine = stage.partition("@")
    if machine and machine not in MACHINES:
        near = difflib.get_close_matches(machine, MACHINES, 1, cutoff=0)[0]
        expected = f"one of {', '.join(MACHINES)}"
        raise UserError("configs/blip3o_next_3b.py", got=f"@{machine}", expected=expected, do=f"try {stage}@{near}")
    micro_batches = MACHINES.get(machine, {}).get(stage.partition("-")[0], 1)
    stage, _, how = stage.partition("-")
    stages = {"pretrain": _pretrain, "sft": _sft, "edit": _edit, "steps": _steps, "tokenizer": _tokenizer, "vae": _vae}
    if stage not in stages or how not in ("", "precomputed"):
        expected = f"one of {', '.join(stages)}, with -precomputed behind it or not"
        raise UserError("configs/blip3o_next_3b.py", got=f"{stage!r} {how!r}", expected=expected, do="choose one")
    config = stages[stage]()
    config.optimizer.accumulation = micro_batches
    if how:
        config.row.precomputed = True
        for source in config.data.sources.values():
            source.kind = "arrayrecord"
            source.options = {}
    return config


def _pretrain():
    config = _joint("blip3o-next-3b", 336_000, common.DECODER_AND_CAPTIONS)
    config.optimizer.learning_rate = 1e-4
    # 27 and 5 million pairs, read as one set
    sources = {"long_caption": common.source("webdataset"), "short_caption": common.source("webdataset")}
    config.data = common.data(sources, 512, weighting="repetition", num_workers=8)
    return config


def _sft():
    config = _joint("blip3o-next-3b", 7_000, common.DECODER_AND_CAPTIONS)
    sources = {"blip3o_60k": common.source("webdataset"), "sharegpt4o": common.source("jsonl")}
    config.data = common.data(sources, 128, weighting="repetition", num_workers=8)
    return config


def _edit():
    config = _joint("blip3o-next-3b-edit", 20_000, common.EDITING)
    config.loop.update({"save_every": 4000, "keep": 10})
    one = {"max_references": 1}
    sources = {
        "nano_banana": common.source("jsonl", "edit", 10.0, **one),
        "x2i2": common.source("jsonl", "edit", 1.0, **one),
        "sharegpt4o": common.source("jsonl", "edit", 10.0, **one),
        "blip3o_60k": common.source("webdataset", "t2i", 2.0),
    }
    config.data = common.data(sources, 192, weighting="repetition", num_workers=8)
    config.row = common.row(length=EDIT_LENGTH, max_references=1)
    return config


def _steps():
    config = common.base("mean_flow", 10_000, preset("blip3o-next-3b"))
    config.settings = {"encode_rows": 1}
    config.trainable = common.DIT
    config.numerics.remat = "full"
    config.optimizer.update({"learning_rate": 1e-5, "min_learning_rate": 1e-6, "ema_decay": 0.999})
    config.export_ema = True
    sources = {"blip3o_60k": common.source("webdataset"), "sharegpt4o": common.source("jsonl")}
    config.data = common.data(sources, 128, weighting="repetition", num_workers=8)
    config.row = common.row(length=LENGTH)
    return config


def _joint(geometry: str, num_steps: int, trainable: tuple):
    config = common.base("joint", num_steps, preset(geometry))
    config.settings = {"stochastic_codes": True, "encode_rows": 1}
    config.trainable = trainable
    config.numerics.remat = "full"
    config.row = common.row(length=LENGTH)
    return config


def _tokenizer():
    config = common.base("tokenizer", 100_000, preset("blip3o-next-3b"))
    config.settings = {"features": {}, "stochastic_codes": True}
    config.trainable = common.IMAGE_TOKENIZER_WITHOUT_CODES
    config.optimizer.learning_rate = 1e-4
    config.numerics.remat = "full"
    config.data = common.data({"pictures": common.source("webdataset")}, 512, num_workers=8)
    config.row = common.row(length=0)
    return config


def _vae():
    config = common.base("autoencoder", 100_000, preset("blip3o-next-3b"))
    config.model.image_size = 256
    config.settings = {"laplacian_weight": 1.0, "adversarial": {"start_step": 10_000}}
    config.trainable = common.AUTOENCODER
    config.data = common.data({"pictures": common.source("webdataset")}, 256, num_workers=8)
    config.row = common.row(length=0)
    return config
