"""The model of the demo world, from nothing: `configs/demo.py:STAGE`, stages in the order of STAGES.

Every stage starts from the model of the one before (`--config.init_from=RUNS/STAGE/model`); scripts/train_demo.py runs
them all. Numbers of steps and batch sizes are those of the embedded model, trained on CPU. FURTHER go on from there, in
their order; what they have reached so far is in docs/results.md, the embedded model is without them.
"""

import dataclasses
import pathlib

import blip3o_jax
from blip3o_jax.config import EditConfig
from blip3o_jax.presets import preset
from configs import common

STAGES = ("vae", "features", "tokenizer", "pretrain", "sft", "pretrain_long", "sft_long")
FURTHER = ("decoder", "signs", "final")
TOKENIZER = pathlib.Path(blip3o_jax.__file__).parent / "assets" / "demo"
CAPTION_SHARES = {"single_object": 0.05, "two_object": 0.13, "counting": 0.12, "colors": 0.07, "position": 0.24,
                  "color_attr": 0.21, "text": 0.18}  # fmt: skip
"""Task -> share of the captions in the later stages: more of what is learnt last."""
MUON = {"muon_rules": ((r"^decoder/layers/.*kernel$", True), (r"", False)), "b2": 0.95,
        "learning_rate_rules": ((r"^decoder/", 1.0), (r"", 0.3))}  # fmt: skip
"""Muon for the decoder's matrices; smaller steps for the other parts, which see few rows of a batch."""
PROMPTS = (
    "a photo of a red star", "a photo of three blue squares", "a photo of a ring and a cross",
    "a photo of a red circle left of a blue square", "a photo of a green triangle above a pink star",
    "a photo of a yellow ring and a brown cross", 'a sign that says "CAB"', "draw two purple hoops",
)  # fmt: skip


def get_config(stage: str = "pretrain"):
    """The configuration of a stage."""
    makers = (_vae, _features, _tokenizer, _pretrain, _sft, _pretrain_long, _sft_long, _decoder, _signs, _final)
    stages = dict(zip(STAGES + FURTHER, makers, strict=True))
    if stage not in stages:
        raise ValueError(f"configs/demo.py: got {stage!r} - expected one of {', '.join(stages)} - choose one")
    return stages[stage]()


def _world(task: str = "t2i", split: str = "train", weight: float = 1.0, **options) -> dict:
    return {"kind": "world", "path": split, "task": task, "weight": weight, **options}


def _base(objective: str, num_steps: int, learning_rate: float, model):
    config = common.base(objective, num_steps, model)
    config.tokenizer = str(TOKENIZER)
    config.numerics.update({"frozen_dtype": "float32", "unroll": True})
    config.optimizer.update(
        {"learning_rate": learning_rate, "min_learning_rate": learning_rate / 50, "warmup_steps": 200, "b2": 0.98,
         "weight_decay": 0.01, "ema_decay": 0.998}
    )  # fmt: skip
    config.loop.update({"log_every": 50, "save_every": 500, "keep": 1})
    config.export_ema = True
    config.export_every = 1000
    return config


def _vae():
    config = _base("autoencoder", 3000, 2e-3, preset("demo"))
    config.numerics.dtype = "float32"
    config.settings = {"distance": "l2", "laplacian_weight": 1.0, "unit_weight": 0.02, "latent_noise": 0.05}
    config.trainable = common.AUTOENCODER
    config.data = common.data((_world(),), 32)
    config.row = common.row(length=0)
    return config


def _features():
    """The tokenizer's networks without codes: what codes are then drawn from."""
    config = _tokenizer()
    config.settings.update(
        {"unquantized_share": 1.0, "codebook_from_data": False, "codebook_weight": 0.0, "commitment_weight": 0.0}
    )
    config.loop.num_steps = 600
    return config


def _tokenizer():
    config = _base("tokenizer", 3000, 1e-3, preset("demo"))
    config.numerics.dtype = "float32"
    config.settings = {"pixels": {"weight": 4.0}, "pool_scales": (1,), "codebook_from_data": True,
                       "unquantized_share": 0.12}  # fmt: skip
    config.trainable = common.IMAGE_TOKENIZER
    config.data = common.data((_world(),), 32)
    config.row = common.row(length=0)
    return config


def _pretrain():
    config = _base("joint", 3600, 1.5e-3, preset("demo"))
    config.settings = {"flow_draws": 4, "ce_weight": 0.5}
    config.trainable = common.DECODER_CONNECTORS_AND_DIT
    config.data = common.data((_world(),), 16)
    config.row = common.row(length=96, loss_on="assistant")
    config.samples = {"prompts": PROMPTS, "every": 1200, "guidance_scale": 3.0, "num_inference_steps": 20,
                      "use_ema": True}  # fmt: skip
    config.validation = {"data": common.data((_world("t2i", "held_out"),), 32), "every": 500, "batches": 4,
                         "use_ema": True}  # fmt: skip
    return config


def _sft():
    edit = EditConfig(vae_condition=True, vae_noise=True)
    config = _base("joint", 1500, 8e-4, dataclasses.replace(preset("demo"), edit=edit))
    config.optimizer.warmup_steps = 100
    config.settings = {"flow_draws": 2, "ce_weight": 0.5}
    config.trainable = common.DECODER_CONNECTORS_AND_DIT
    config.data = common.data((_world(weight=2.0), _world("edit", weight=2.0), _world("reconstruct", weight=0.2)), 16)
    config.row = common.row(length=160, max_references=1, loss_on="assistant")
    config.validation = {"data": common.data((_world("t2i", "held_out"), _world("edit", "held_out")), 32),
                         "every": 500, "batches": 4, "use_ema": True}  # fmt: skip
    return config


def _pretrain_long():
    return _longer(_pretrain(), 7000, 1e-3)


def _sft_long():
    config = _longer(_sft(), 2600, 8e-4)
    config.settings = {"flow_draws": 1, "ce_weight": 1.0}
    config.data.batch_size = 24
    config.data.sources = (
        _world(weight=2.0), _world(weight=0.2, without_text=True), _world("edit", weight=2.0),
        _world("edit", weight=0.2, without_text=True), _world("reconstruct", weight=0.2),
    )  # fmt: skip
    return config


def _decoder():
    """The decoder above all: large batches of captions, a few of their rows for the diffusion transformer."""
    config = _longer(_sft_long(), 2000, 1.5e-3)
    config.optimizer.update(MUON)
    config.optimizer.accumulation = 4  # on CPU a third faster: what 16 rows need fits its caches
    config.settings = {"flow_draws": 2, "flow_every": 8, "ce_weight": 1.0}
    config.data.batch_size = 64
    config.data.seed = 2
    config.data.sources = (_world(options={"shares": CAPTION_SHARES}), _world(weight=0.1, without_text=True))
    config.row = common.row(length=96, max_references=0, loss_on="assistant")
    config.validation.data = common.data((_world("t2i", "held_out"),), 64)
    return config


def _signs():
    """The same with more signs: in `decoder` their letters had only begun to follow the caption."""
    config = _decoder()
    config.loop.num_steps = 1500
    config.optimizer.update({"learning_rate": 1.2e-3, "min_learning_rate": 2e-5})
    config.data.seed = 3
    config.data.sources[0]["options"]["shares"] = {**CAPTION_SHARES, "text": 0.4}
    return config


def _final():
    """Captions, edits and reconstruction once more, both halves."""
    config = _longer(_sft_long(), 800, 1e-3)
    config.optimizer.update(MUON)
    config.optimizer.accumulation = 2
    config.settings = {"flow_draws": 2, "flow_every": 3, "ce_weight": 1.0}
    config.data.batch_size = 48
    config.data.seed = 4
    config.data.sources = (
        _world(weight=1.6, options={"shares": CAPTION_SHARES}), _world(weight=0.1, without_text=True),
        _world("edit", weight=3.2), _world("edit", weight=0.1, without_text=True), _world("reconstruct", weight=0.1),
    )  # fmt: skip
    config.validation.data.batch_size = 48
    return config


def _longer(config, num_steps: int, learning_rate: float):
    """A stage once more on other pictures, at higher noise levels.

    The autoencoder decodes latents with noise of deviation 0.5 as well as clean ones: little of low levels is seen.
    """
    config.model.schedule.shift = 3.0
    config.loop.num_steps = num_steps
    config.optimizer.update({"learning_rate": learning_rate, "min_learning_rate": learning_rate / 50})
    config.data.seed = 1
    return config
