"""The model of the demo world, from scratch: `configs/demo.py:STAGE`, stages in the order of STAGES.

Every stage starts from the model of the previous one (`--config.init_from=RUNS/STAGE/model`); scripts/train_demo.py
runs them all. Steps and batch sizes are for a CPU. docs/results.md has the results of every stage.
"""

import dataclasses
import pathlib

import blip3o_jax
from blip3o_jax.config import EditConfig
from blip3o_jax.config.presets import preset
from blip3o_jax.demo.world import prompts
from blip3o_jax.errors import UserError
from configs import common

STAGES = ("vae", "features", "tokenizer", "pretrain", "sft", "paint", "finish", "polish", "edits", "balance", "letters",
          "decode")  # fmt: skip
"""From scratch to SUPERVISED."""
FURTHER_STAGES = ("tokens", "steps", "pairs")
"""Of a finished model. `tokens` and the recipe `all_demo` of configs/grpo.py lead from SUPERVISED to EMBEDDED."""
EMBEDDED = TOKENIZER = pathlib.Path(blip3o_jax.__file__).parent / "assets" / "demo"
SUPERVISED = pathlib.Path(__file__).parent.parent / "docs" / "demo" / "supervised"
"""An earlier stage of the embedded model, where fine-tuning recipes start."""
CAPTION_SHARES = {"single_object": 0.04, "two_object": 0.12, "counting": 0.13, "colors": 0.06, "position": 0.21,
                  "color_attr": 0.19, "text": 0.25}  # fmt: skip
"""Task -> share of the captions: more of what is learnt last."""
POLISH_SHARES = {"single_object": 0.03, "two_object": 0.11, "counting": 0.11, "colors": 0.05, "position": 0.19,
                 "color_attr": 0.16, "text": 0.35}  # fmt: skip
EDIT_SHARES = {"recolor": 0.18, "add": 0.16, "remove": 0.12, "replace": 0.22, "move": 0.12, "text": 0.15,
               "keep": 0.05}  # fmt: skip
"""Kind of edit -> share of the edits of the stage `polish`."""
HARD_EDITS = {"recolor": 0.2, "add": 0.2, "remove": 0.12, "replace": 0.26, "move": 0.16, "text": 0.03, "keep": 0.03}
BALANCE_SHARES = {"single_object": 0.02, "two_object": 0.09, "counting": 0.12, "colors": 0.04, "position": 0.18,
                  "color_attr": 0.2, "text": 0.35}  # fmt: skip
TOKENS_EDITS = {"recolor": 0.2, "add": 0.18, "remove": 0.1, "replace": 0.24, "move": 0.21, "text": 0.04, "keep": 0.03}
TOKENS_SHARES = {"single_object": 0.02, "two_object": 0.1, "counting": 0.13, "colors": 0.05, "position": 0.3,
                 "color_attr": 0.2, "text": 0.2}  # fmt: skip
LENGTHS = (0.05, 0.1, 0.2, 0.3, 0.35)
"""Shares of the signs with one to five letters from the stage `balance` on: more of the long ones."""
DIT_MATRICES = r"^dit/blocks/.*(query|key|value|out|expand|project)/kernel$"
PROMPTS = (
    "a photo of a red star", "a photo of three blue squares", "a photo of a ring and a cross",
    "a photo of a red circle left of a blue square", "a photo of a green triangle above a pink star",
    "a photo of a yellow ring and a brown cross", 'a sign that says "CAB"', "draw two purple hoops",
)  # fmt: skip


def get_config(stage: str = "pretrain"):
    """The configuration of a stage."""
    makers = (_vae, _features, _tokenizer, _pretrain, _sft, _paint, _finish, _polish, _edits, _balance, _letters,
              _decode, _tokens, _steps, _pairs)  # fmt: skip
    stages = dict(zip(STAGES + FURTHER_STAGES, makers, strict=True))
    if stage not in stages:
        raise UserError("configs/demo.py", got=f"{stage!r}", expected=f"one of {', '.join(stages)}", do="choose one")
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
    config.loop.num_steps = 250
    config.optimizer.learning_rate = 1e-3
    return config


def _tokenizer():
    """Codes of single patches, on plain backgrounds, of many objects and signs.

    A code that knows its own patch alone leaves the codes around an edit as they were, and blank patches are all one.
    """
    config = _base("tokenizer", 1800, 2e-3, preset("demo"))
    config.optimizer.min_learning_rate = 2e-5
    config.numerics.dtype = "float32"
    config.settings = {"pixels": {"weight": 4.0}, "pool_scales": (1,), "codebook_from_data": True,
                       "unquantized_share": 0.12}  # fmt: skip
    config.trainable = common.IMAGE_TOKENIZER
    shares = {"counting": 0.2, "color_attr": 0.4, "text": 0.4}
    config.data = common.data((_world(options={"shares": shares, "plain": True}),), 64)
    config.row = common.row(length=0)
    return config


def _pretrain():
    """Captions and descriptions: the decoder above all, a part of the rows for the diffusion transformer."""
    config = _joint(5200, 2e-3, preset("demo"))
    config.optimizer.accumulation = 2  # on CPU faster: what 16 rows need fits its caches
    config.settings = {"flow_draws": 3, "flow_every": 2, "ce_weight": 1.0}
    config.data = common.data((*_captions(1.0, 0.6), _world(weight=0.08, without_text=True)), 32)
    config.row = common.row(length=104, loss_on="assistant")
    config.samples = {"prompts": PROMPTS, "every": 1000, "guidance_scale": 1.0, "num_inference_steps": 20,
                      "use_ema": True}  # fmt: skip
    config.validation = {"data": common.data((_world("t2i", "held_out"),), 64), "every": 1000, "batches": 4,
                         "use_ema": True}  # fmt: skip
    return config


def _sft():
    """Edits and reconstruction beside captions."""
    edit = EditConfig(vae_condition=True, vae_noise=True)
    config = _joint(1500, 1.2e-3, dataclasses.replace(preset("demo"), edit=edit))
    config.optimizer.update({"warmup_steps": 100, "accumulation": 2})
    config.settings = {"flow_draws": 3, "ce_weight": 1.0}
    config.data = common.data(_mixture(_captions(1.0, 0.3), _world("edit", weight=1.8), (0.1, 0.1), 0.1), 32)
    config.data.seed = 1
    config.row = common.row(length=160, max_references=1, loss_on="assistant")
    config.validation = {"data": common.data((_world("t2i", "held_out"), _world("edit", "held_out")), 32),
                         "every": 500, "batches": 4, "use_ema": True}  # fmt: skip
    return config


def _paint():
    """The diffusion transformer alone, many noise levels of every row: it has learnt less than the decoder by then."""
    config = _sft()
    config.loop.num_steps = 2300
    config.optimizer.update({"learning_rate": 1.2e-3, "min_learning_rate": 1e-5, "b2": 0.98,
                             "muon_rules": ((DIT_MATRICES, True), (r"", False)),
                             "learning_rate_rules": ((DIT_MATRICES, 1.0), (r"", 0.5))})  # fmt: skip
    config.settings = {"flow_draws": 4, "ce_weight": 0.0}
    config.trainable = common.CONNECTORS_AND_DIT
    config.data.sources = (*_captions(1.0, 0.3), _world("edit", weight=1.0), _world("reconstruct", weight=0.2))
    config.data.seed = 2
    return config


def _finish():
    """Both halves again, on captions and edits."""
    config = _sft()
    config.loop.num_steps = 1700
    config.optimizer.update({"learning_rate": 1e-3, "min_learning_rate": 1e-5, "warmup_steps": 50,
                             "muon_rules": ((r"^decoder/layers/.*kernel$", True), (DIT_MATRICES, True), (r"", False)),
                             })  # fmt: skip
    config.settings = {"flow_draws": 3, "flow_every": 2, "ce_weight": 1.0}
    config.data.sources = _mixture(_captions(1.2, 0.3), _world("edit", weight=1.8), (0.15, 0.12), 0.1)
    config.data.seed = 3
    return config


def _polish():
    """As before, with more signs and more of the edits that are hardest."""
    config = _finish()
    config.loop.num_steps = 1600
    config.optimizer.learning_rate = 8e-4
    edit = _world("edit", weight=1.9, options={"shares": EDIT_SHARES})
    config.data.sources = _mixture(_captions(1.0, 0.25, POLISH_SHARES), edit, (0.12, 0.12), 0.1)
    config.data.seed = 4
    return config


def _edits():
    """Mostly edits, and mostly for the decoder: it errs more often than what is painted from the right codes."""
    config = _polish()
    config.loop.num_steps = 400
    config.optimizer.update({"learning_rate": 5e-4, "warmup_steps": 25})
    config.settings.flow_every = 4
    edit = _world("edit", weight=2.6, options={"shares": HARD_EDITS})
    config.data.sources = _mixture(_captions(0.7, 0.2, POLISH_SHARES), edit, (0.1, 0.1), 0.05)
    config.data.seed = 5
    return config


def _balance():
    """As `polish`, with more captions of two things and more signs of four and five letters."""
    config = _polish()
    config.loop.num_steps = 900
    config.optimizer.warmup_steps = 25
    edit = _world("edit", weight=1.5, options={"shares": EDIT_SHARES})
    config.data.sources = _mixture(_captions(1.5, 0.3, BALANCE_SHARES, LENGTHS), edit, (0.15, 0.1), 0.08)
    config.data.seed = 6
    return config


def _letters():
    """The diffusion transformer alone, mostly on long signs: by then the decoder spells them, but few can be read."""
    config = _paint()
    config.loop.num_steps = 500
    config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 25})
    signs = _world(weight=1.2, options={"shares": {"text": 1.0}, "lengths": LENGTHS})
    config.data.sources = (
        signs, *_captions(0.7, 0.2, BALANCE_SHARES, LENGTHS),
        _world("edit", weight=0.6, options={"shares": EDIT_SHARES}), _world("reconstruct", weight=0.15),
        _world(weight=0.15, without_text=True, options={"lengths": LENGTHS}),
    )  # fmt: skip
    config.data.seed = 7
    return config


def _decode():
    """The autoencoder's decoder alone, on long signs above all: latents and all that was learnt of them stay."""
    config = _vae()
    config.model = _sft().model  # with the connector of edits
    config.loop.num_steps = 700
    config.optimizer.update({"learning_rate": 1e-3, "warmup_steps": 50})
    config.settings.unit_weight = 0.0  # of latents
    config.trainable = ((r"^autoencoder/decoder/", True), (r"", False))
    config.data.sources = (
        _world(weight=2.0, options={"shares": {"text": 1.0}, "lengths": LENGTHS}),
        _world(options={"shares": {"counting": 0.3, "position": 0.35, "color_attr": 0.35}}),
    )  # fmt: skip
    config.data.seed = 8
    return config


def _tokens():
    """The decoder alone, on edits and relations above all; the flow loss keeps its states readable by the DiT."""
    config = _finish()
    config.init_from = str(SUPERVISED)
    config.model.update({"num_inference_steps": 8, "guidance_scale": 1.0})  # as good as 30 and 2: docs/results.md
    config.loop.num_steps = 1800
    config.optimizer.update({"learning_rate": 8e-4, "warmup_steps": 25})
    config.settings.flow_every = 8
    config.trainable = common.DECODER
    edit = _world("edit", weight=2.4, options={"shares": TOKENS_EDITS})
    config.data.sources = _mixture(_captions(1.2, 0.2, TOKENS_SHARES, LENGTHS), edit, (0.12, 0.12), 0.04)
    config.data.seed = 10
    return config


def _steps():
    """The diffusion transformer of the embedded model to one to four steps, guidance included."""
    config = _base("mean_flow", 300, 5e-4, None)
    config.init_from = str(EMBEDDED)
    config.numerics.update({"dtype": "float32", "unroll": False})  # there is more to compile than to run
    config.optimizer.update({"min_learning_rate": 1e-5, "warmup_steps": 10, "ema_decay": 0.97, "weight_decay": 0.0,
                             "muon_rules": ((DIT_MATRICES, True), (r"", False))})  # fmt: skip
    config.settings = {"draws": 2}
    config.trainable = common.DIT
    sources = (*_captions(1.0, 0.2, BALANCE_SHARES, LENGTHS), _world("edit", weight=1.0))
    config.data = common.data(sources, 16)
    config.data.seed = 9
    config.row = common.row(length=160, max_references=1, loss_on="assistant")
    config.loop.update({"log_every": 10, "save_every": 50})
    config.export_every = 50
    return config


def _pairs():
    """Colour-shape pairs that the supervised stages never show: fine-tuning to compare adapters with full training."""
    config = _base("joint", 200, 2e-4, None)
    config.init_from = str(SUPERVISED)
    config.optimizer.update({"warmup_steps": 10, "ema_decay": 0.97, "weight_decay": 0.0})
    config.settings = {"flow_every": 8}
    config.trainable = common.DECODER
    shares = {"counting": 0.3, "colors": 0.1, "position": 0.3, "color_attr": 0.3}
    new_pairs = _world(split="new_pairs", options={"shares": shares})
    config.data = common.data((new_pairs, *_captions(0.8, 0.2, BALANCE_SHARES, LENGTHS)), 32)
    config.data.seed = 11
    config.row = common.row(length=104, loss_on="assistant")
    config.loop.update({"log_every": 10, "save_every": 100})
    return config


def _mixture(
    captions: tuple[dict, ...], edit: dict, without_text: tuple[float, float], reconstruct: float
) -> tuple[dict, ...]:
    """Sources of all tasks; `without_text` are the weights of captions and of edits whose words are left out."""
    return (
        *captions, _world(weight=without_text[0], without_text=True),
        edit, _world("edit", weight=without_text[1], without_text=True),
        _world("reconstruct", weight=reconstruct),
    )  # fmt: skip


def _captions(
    weight: float, descriptions: float, shares: dict[str, float] = CAPTION_SHARES, lengths=prompts.LENGTHS
) -> tuple[dict, dict]:
    """Captions, and descriptions of all that an image shows."""
    options = {"shares": shares, "lengths": lengths}
    return (
        _world(weight=weight, options=options),
        _world(weight=descriptions, options={**options, "wording": "description"}),
    )


def _joint(num_steps: int, learning_rate: float, model):
    """Muon for the decoder's matrices; smaller steps for the other parts, which see few rows of a batch.

    The autoencoder decodes latents with noise of deviation 0.5 as well as clean ones: low levels are seen seldom.
    """
    config = _base("joint", num_steps, learning_rate, model)
    config.model.schedule.shift = 3.0
    config.optimizer.update(
        {"muon_rules": ((r"^decoder/layers/.*kernel$", True), (r"", False)), "b2": 0.95,
         "learning_rate_rules": ((r"^decoder/", 1.0), (r"", 0.6))}
    )  # fmt: skip
    config.trainable = common.DECODER_CONNECTORS_AND_DIT
    return config
