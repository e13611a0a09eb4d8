"""Reinforcement learning on image tokens (GRPO) and on denoising steps (Flow-GRPO): `configs/grpo.py:RECIPE`.

python train.py --config=configs/grpo.py:RECIPE --workdir=DIR [--config.init_from=CHECKPOINT]

| RECIPE | content |
|---|---|
| general (default) | GenEval-style prompts of the demo world; a starting point for your own, needs init_from |
| tiny | a fresh model of a few layers learns to paint red: a smoke test, a minute on CPU |
| demo, text_demo, edit_demo, all_demo | the demo model before them on composition, signs, edits, all at once |
| flow_demo, nft_demo, awm_demo | its diffusion half on the colour of images: three methods side by side |
| pruned_demo, grpo_nft_demo | a pruned diffusion transformer on signs, alone and with the decoder: need init_from |
| geneval_3b, text_3b | the released recipes; the prompts are a file: --config.data.sources.prompts.path=FILE |
| edit_3b, nft_3b, grpo_nft_3b | edits by their objects; the diffusion half, or both, on signs: ours, not run |

Rewards are rows of `rl.rewards`: a name of `blip3o_jax.rl.rewards`, `package.module:function`, or `remote` with a url.
"""

from blip3o_jax.config.presets import preset
from blip3o_jax.errors import UserError
from configs import common, tiny
from configs.blip3o_next_3b import EDIT_LENGTH
from configs.demo import SUPERVISED

JUDGED = {"top_k": 0, "top_p": 0.95}  # how sample.py and the evaluation draw the demo model's tokens
COMPOSITION = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
HARD = {"single_object": 0.2, "two_object": 1.0, "counting": 2.0, "colors": 0.5, "position": 2.0, "color_attr": 2.0}
HARDEST = {"two_object": 1.5, "counting": 1.5, "position": 3.0}  # of these, where edits are learnt beside them
HARD_EDITS = {"recolor": 1.0, "add": 1.0, "remove": 0.7, "replace": 1.5, "move": 1.2, "text": 0.3, "keep": 0.3}
"""Shares of training: groups whose samples are all right teach nothing."""
NEW_PAIRS = {"counting": 1.5, "colors": 0.5, "position": 2.0, "color_attr": 2.0}
NEW_PAIRS_EDITS = {"recolor": 1.0, "add": 1.0, "replace": 1.5}
"""Likewise, of half of the prompts: no image of training shows these pairs of colour and shape, but a reward needs
none."""
LENGTHS = (0.1, 0.1, 0.2, 0.3, 0.3)  # shares of signs with one to five letters, likewise


def get_config(recipe: str = "general"):
    """The configuration of a recipe."""
    recipes = {
        "general": _general,
        "tiny": _tiny,
        "tiny_flow": _tiny_flow,
        "tiny_nft": _tiny_nft,
        "tiny_awm": _tiny_awm,
        "tiny_grpo_nft": _tiny_grpo_nft,
        "demo": _demo,
        "text_demo": _text_demo,
        "edit_demo": _edit_demo,
        "all_demo": _all_demo,
        "flow_demo": _flow_demo,
        "nft_demo": _nft_demo,
        "awm_demo": _awm_demo,
        "pruned_demo": _pruned_demo,
        "grpo_nft_demo": _grpo_nft_demo,
        "geneval_3b": _geneval_3b,
        "text_3b": _text_3b,
        "edit_3b": _edit_3b,
        "nft_3b": _nft_3b,
        "grpo_nft_3b": _grpo_nft_3b,
    }
    if recipe not in recipes:
        raise UserError("configs/grpo.py", got=f"{recipe!r}", expected=f"one of {', '.join(recipes)}", do="choose one")
    return recipes[recipe]()


def _rewards(kinds: tuple[str, ...] = (), **weights: float) -> tuple[dict, ...]:
    """Rewards by name, for prompts of some kinds; default: of all."""
    return tuple({"name": name, "weight": weight, "kinds": kinds} for name, weight in weights.items())


def _world(task: str = "t2i", split: str = "train", tasks: tuple[str, ...] = (), **options) -> dict:
    if tasks:
        options["shares"] = dict.fromkeys(tasks, 1.0)
    return {"kind": "world", "path": split, "task": task, "options": options}


def _base(objective: str, num_steps: int, learning_rate: float, model=None):
    config = common.base(objective, num_steps, model)
    config.reference_from = common.placeholder(str)
    config.trainable = common.DECODER if objective == "grpo" else common.DIT
    config.optimizer.update(
        {"learning_rate": learning_rate, "min_learning_rate": 0.0, "warmup_steps": 0, "schedule": "cosine"}
    )
    config.loop.update({"log_every": 1, "save_every": 50})
    return config


def _general(model=None):
    config = _base("grpo", 400, 5e-6, model)
    config.settings = {"beta": 1e-3}
    config.data = common.data({"prompts": _world(tasks=COMPOSITION)}, 64)
    config.row = common.row(length=1024, max_references=0)
    config.rl = {
        "rewards": _rewards(geneval=1.0),
        "group_size": 16,
        "minibatches": 1,
        "epochs": 1,
        "advantages": "grpo",
        "sample_batch_size": common.placeholder(int),
        "render": {"num_inference_steps": 20, "guidance_scale": 2.0, "shared_noise": True},
        "guards": {"max_kl": 0.5, "min_entropy": 0.05, "max_gap": 0.1, "max_duplicates": 0.5, "action": "warn"},
        "groups_every": 25,
    }
    return config


def _tiny():
    config = _base("grpo", 30, 5e-3, tiny.TINY)
    config.tokenizer = str(tiny.TOKENIZER)
    config.numerics.dtype = config.numerics.frozen_dtype = "float32"
    config.settings = {"beta": 1e-3}
    config.data = common.data({"prompts": _world(tasks=("colors",), size=tiny.SIDE)}, 32)
    config.row = common.row(length=112)
    config.rl = {
        "rewards": _rewards(redness=1.0),
        "group_size": 8,
        "minibatches": 2,
        "render": {"num_inference_steps": 3, "guidance_scale": 1.0},
    }
    return config


def _tiny_flow():
    config = _tiny()
    config.objective = "flow_grpo"
    config.trainable = common.DIT
    config.optimizer.learning_rate = 1e-3
    config.settings = {
        "num_inference_steps": 4, "train_steps": 3, "guidance_scale": 1.0, "clip": 1e-2, "beta": 1e-3
    }  # fmt: skip
    config.rl.advantages = "grpo_global"
    return config


def _tiny_nft(objective: str = "nft"):
    config = _tiny_flow()
    config.objective = objective
    config.settings = {"draws": 2}
    config.rl.minibatches = 1
    config.rl.render = {"num_inference_steps": 4, "guidance_scale": 1.0}
    return config


def _tiny_awm():
    return _tiny_nft("awm")


def _tiny_grpo_nft():
    config = _tiny()
    config.objective = "grpo_nft"
    config.trainable = common.DECODER_AND_DIT
    config.settings = {"draws": 2}
    config.optimizer.learning_rate_rules = ((r"^dit/", 0.2), (r"", 1.0))
    config.rl.minibatches = 1
    config.rl.render.shared_noise = False  # what the image owes to its noise is for the DiT to learn
    return config


def _from_demo(objective: str, num_steps: int, learning_rate: float):
    """What learns is the distribution that is judged: truncated and guided as `sample.py` does it."""
    config = _base(objective, num_steps, learning_rate)
    config.init_from = str(SUPERVISED)
    config.numerics.dtype = config.numerics.frozen_dtype = "float32"  # 64 samples are little work for any device
    config.loop.update({"keep": 1})
    config.optimizer.update({"min_learning_rate": learning_rate / 5, "warmup_steps": 5, "b2": 0.98, "ema_decay": 0.98})
    config.export_ema = True
    # in float32 the log-probabilities of sampler and trainer are equal
    config.settings = {"beta": 0.005, "sampling": JUDGED, "rescore": False}
    new_pairs = _world(split="new_pairs", shares=NEW_PAIRS)
    config.data = common.data({"prompts": _world(shares=HARD), "pairs": new_pairs}, 64)
    config.row = common.row(length=96)
    config.rl = {
        "rewards": _rewards(geneval=0.5, geneval_strict=0.5),
        "group_size": 8,
        "minibatches": 1,
        "epochs": 1,
        # one step without guidance shows what the tokens say as well as thirty with it: docs/results.md
        "render": {"num_inference_steps": 1, "guidance_scale": 1.0, "shared_noise": True},
        "guards": {"max_kl": 0.3, "patience": 3, "action": "raise_kl"},
        "groups_every": 40,
        "held_out": _held_out(_rewards(geneval_strict=1.0, geneval=1.0), tasks=COMPOSITION),
    }
    return config


def _held_out(rewards: tuple[dict, ...], task: str = "t2i", **options) -> dict:
    data = common.data({"prompts": _world(task, "held_out", seed=1, **options)}, 48)
    return {"data": data, "rewards": rewards, "count": 96, "every": 40, "use_ema": True}


def _demo():
    return _from_demo("grpo", 150, 1e-4)


def _all_demo():
    """Captions, signs and edits at once, as `sample.py` draws them: the last stage of the embedded model."""
    config = _from_demo("grpo", 300, 1.5e-4)
    config.optimizer.min_learning_rate = 1.5e-5
    config.data = common.data(
        {
            "prompts": _world(shares=HARD | HARDEST | {"text": 1.5}, lengths=LENGTHS) | {"weight": 2.2},
            "pairs": _world(split="new_pairs", shares=NEW_PAIRS | {"position": 3.0}) | {"weight": 1.5},
            "edits": _world("edit", shares=HARD_EDITS) | {"weight": 2.0},
            "edit_pairs": _world("edit", split="new_pairs", shares=NEW_PAIRS_EDITS) | {"weight": 1.3},
        },
        64,
    )
    config.row = common.row(length=160, max_references=1)
    config.rl.rewards = (
        *_rewards(COMPOSITION, geneval=0.5, geneval_strict=0.5),
        *_rewards(("text",), text=0.5, text_exact=0.5),
        *_rewards(("edit",), edit=0.5, edit_graded=0.5),
    )
    config.rl.advantages = "grpo_global"  # as for edits alone
    config.rl.render.num_inference_steps = 4  # the rewards of edits compare pixels
    # tokens beyond the reference's truncated support count with ten nats and more, so its mean says little of drift
    config.rl.guards = {"max_kl": 1.0, "min_entropy": 0.05, "max_duplicates": 0.5, "action": "warn"}
    config.rl.held_out.rewards = (
        *_rewards(COMPOSITION, geneval_strict=1.0),
        *_rewards(("text",), text_exact=1.0),
        *_rewards(("edit",), edit=1.0, edit_psnr=1.0),
    )
    config.rl.held_out.data = common.data(
        {
            "prompts": _world(split="held_out", seed=1, shares=dict.fromkeys(COMPOSITION, 1.0) | {"text": 1.5}),
            "edits": _world("edit", "held_out", seed=1),
        },
        64,
    )
    config.rl.held_out.update({"count": 192, "every": 60})
    return config


def _text_demo():
    config = _from_demo("grpo", 120, 5e-5)
    config.data = common.data({"prompts": _world(tasks=("text",), lengths=LENGTHS)}, 64)
    config.rl.rewards = _rewards(text=0.5, text_exact=0.5)  # the first alone forgives letters too many
    config.rl.held_out = _held_out(_rewards(text=1.0, text_exact=1.0), tasks=("text",))
    return config


def _edit_demo():
    config = _from_demo("grpo", 200, 1.5e-4)
    # without guidance what it gives is learnt; under it little more was: docs/results.md
    config.settings.token_guidance_scale = 1.0
    new_pairs = _world("edit", split="new_pairs", shares=NEW_PAIRS_EDITS)
    config.data = common.data({"prompts": _world("edit", shares=HARD_EDITS), "pairs": new_pairs}, 64)
    config.row = common.row(length=160, max_references=1)
    config.rl.rewards = _rewards(edit=0.5, edit_graded=0.5)
    config.rl.advantages = "grpo_global"  # a few decibels among samples that are all right are to count for little
    config.rl.render.num_inference_steps = 4  # the rewards compare pixels
    config.rl.held_out = _held_out(_rewards(edit=1.0, edit_graded=1.0, edit_psnr=1.0), "edit")
    return config


def _paint_demo(objective: str, learning_rate: float, num_steps: int = 40, **settings):
    """The diffusion half alone, rendered as it is judged."""
    config = _from_demo(objective, num_steps, learning_rate)
    config.trainable = common.DIT
    config.settings = {"sampling": JUDGED, "beta": 1e-4, **settings}
    config.optimizer.update({"min_learning_rate": learning_rate, "ema_decay": None})
    config.export_ema = False
    config.rl.render.num_inference_steps = 4
    config.rl.guards = {"max_zero_advantage": 0.9}
    config.rl.held_out.use_ema = False
    return config


def _red_demo(*method, **settings):
    """The colour of images, which the diffusion half decides; beside it composition, which nothing rewards."""
    config = _paint_demo(*method, **settings)
    config.data.batch_size = 32
    config.rl.rewards = _rewards(redness=1.0)
    config.rl.held_out.rewards = _rewards(redness=1.0, geneval_strict=1.0)
    config.rl.held_out.every = 10
    return config


def _flow_demo():
    noise = {"num_inference_steps": 4, "train_steps": 3, "noise_level": 0.7, "guidance_scale": 1.0}
    return _red_demo("flow_grpo", 5e-4, clip=1e-2, **noise)


def _nft_demo():
    return _red_demo("nft", 3e-4, draws=2)


def _awm_demo():
    return _red_demo("awm", 3e-4, draws=2)


def _pruned_demo():
    """Signs, which a pruned diffusion transformer renders wrongly; beside them composition, which nothing rewards."""
    config = _paint_demo("nft", 5e-5, num_steps=100, draws=2)
    config.init_from = common.placeholder(str)
    config.optimizer.ema_decay = 0.9
    config.export_ema = True
    config.data = common.data({"prompts": _world(tasks=("text",), lengths=LENGTHS)}, 64)
    config.rl.rewards = _rewards(text=0.5, text_exact=0.5)
    judges = *_rewards(COMPOSITION, geneval_strict=1.0), *_rewards(("text",), text_exact=1.0)
    config.rl.held_out = _held_out(judges, shares=dict.fromkeys(COMPOSITION, 1.0) | {"text": 5.0})
    config.rl.held_out.every = 20
    return config


def _grpo_nft_demo():
    """Both halves on signs, from a pruned diffusion transformer."""
    config = _text_demo()
    config.objective = "grpo_nft"
    config.init_from = common.placeholder(str)
    config.trainable = common.DECODER_AND_DIT
    config.loop.num_steps = 100
    config.optimizer.update({"min_learning_rate": config.optimizer.learning_rate, "ema_decay": 0.9})
    config.settings.draws = 2
    config.rl.render.update({"num_inference_steps": 4, "shared_noise": False})
    config.rl.held_out.every = 20
    return config


def _released(num_steps: int, batch_size: int, learning_rate: float, reward: dict, geometry: str = "blip3o-next-3b"):
    config = _general(preset(geometry))
    config.loop.num_steps = num_steps
    config.optimizer.learning_rate = learning_rate
    config.numerics.remat = "full"
    config.data = common.data({"prompts": common.source("prompts")}, batch_size)
    config.row = common.row(length=729 + 295)
    config.rl.rewards = (reward,)
    config.rl.sample_batch_size = 64
    config.rl.render.num_inference_steps = 30
    config.rl.guards.max_zero_advantage = 0.9
    return config


def _geneval_3b():
    return _released(400, 256, 5e-6, {"name": "geneval", "options": {"detector": "mask2former"}})


def _text_3b():
    return _released(900, 512, 1e-6, {"name": "text", "options": {"reader": "rapidocr"}})


def _edit_3b():
    """Prompts with a reference; their metadata describe the image after the edit in GenEval's schema."""
    reward = {"name": "edit", "options": {"detector": "mask2former"}}
    config = _released(400, 256, 5e-6, reward, "blip3o-next-3b-edit")
    config.data.sources.prompts.task = "edit"
    config.row = common.row(length=EDIT_LENGTH, max_references=1)
    config.rl.advantages = "grpo_global"
    return config


def _nft_3b():
    """The diffusion half after `text_3b`: what rendering adds to legibility, without guidance in few steps."""
    config = _released(300, 256, 1e-5, {"name": "text", "options": {"reader": "rapidocr"}})
    config.objective = "nft"
    config.trainable = common.DIT
    config.settings = {"draws": 2}
    config.rl.render = {"num_inference_steps": 8, "guidance_scale": 1.0}
    config.rl.guards = {"max_zero_advantage": 0.9}
    return config


def _grpo_nft_3b():
    """Both halves on signs, from common rollouts; rendered without guidance in few steps."""
    config = _released(300, 256, 1e-6, {"name": "text", "options": {"reader": "rapidocr"}})
    config.objective = "grpo_nft"
    config.trainable = common.DECODER_AND_DIT
    config.settings = {"beta": 1e-3, "draws": 2}
    config.optimizer.learning_rate_rules = ((r"^dit/", 10.0), (r"", 1.0))  # as nft_3b
    config.rl.render = {"num_inference_steps": 8, "guidance_scale": 1.0, "shared_noise": False}
    return config
