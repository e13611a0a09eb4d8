"""Hooks that show the progress of reinforcement learning: held-out scores, the best and worst samples of groups.

P prompts with G samples each.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from blip3o_jax import treepath
from blip3o_jax.data.images import grid, save_png
from blip3o_jax.errors import require
from blip3o_jax.evals.sheet import captioned
from blip3o_jax.files import parse_json, read_text
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.rl.config import HeldOutConfig
from blip3o_jax.rl.judge import Judge, judged, known
from blip3o_jax.rl.prompt_stream import PromptStream
from blip3o_jax.rl.rollout import RolloutSource
from blip3o_jax.rl.samplers import Sampler
from blip3o_jax.train.metrics import Reporter
from blip3o_jax.train.run import Hook
from blip3o_jax.train.step import TrainState
from blip3o_jax.types import Params

GROUPS = 6  # groups on a sheet
EACH = 2  # best and worst images of a group
SIDE = 128  # pixels; larger images are scaled down to it


def held_out_hook(config: HeldOutConfig, sampler: Sampler, frozen: Params, seed: int, directory: str) -> Hook:
    """Scores images of held-out prompts, with the same random numbers every time.

    Logs `held_out/LABEL`, and `held_out/LABEL/TAG` where the metadata have a `tag` or a `kind`.

    Args:
      config: prompts, rewards and schedule.
      sampler: sampler of the rollouts.
      frozen: parameters that do not train.
      directory: working directory of the run; its records hold the earlier scores.
    """
    records = pathlib.Path(directory) / "metrics.jsonl"
    stream = PromptStream(dataclasses.replace(config.data, shuffle=False), sampler.check, "rl.held_out.data")
    prompts, judge = stream.draw_readable(config.count), Judge(config.rewards, "rl.held_out.rewards")
    inputs = [prompt.judged() for prompt in prompts]
    judge.check(inputs)
    judge.warn_unused(inputs)
    size = min(config.data.batch_size, len(prompts))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.arange(len(prompts) + size))

    def run(step: int, state: TrainState, reporter: Reporter) -> dict[str, float]:
        del step, reporter
        trained = state.ema if config.use_ema else state.params
        params = treepath.merge(trained, frozen)
        images = []
        for first in range(0, len(prompts), size):
            part, own = prompts[first : first + size], keys[first : first + size]
            padded = [*part, *part[-1:] * (size - len(part))]
            images.append(sampler.images(params, padded, own)[: len(part)])
        _, parts = judged(judge, prompts, np.concatenate(images), keys[: len(prompts)])
        parts = {label: values for label, values in parts.items() if len(known(values))}
        if config.max_drop is not None:
            for label, values in parts.items():
                check_drop(records, f"held_out/{label}", float(known(values).mean()), config.max_drop)
        return {name: value for label, values in parts.items() for name, value in _means(label, prompts, values)}

    return Hook(config.every, run, "held_out/")


def check_drop(records: pathlib.Path, name: str, value: float, bound: float) -> None:
    """Raises UserError if `value` is more than `bound` below the best value of that name in the records."""
    lines = read_text(records, "records of the run").splitlines(keepends=True) if records.exists() else []
    before = [parse_json(line, str(records)).get(name) for line in lines if line.endswith("\n")]
    best = max((old for old in before if old is not None), default=value)
    expected = f"a decrease of at most rl.held_out.max_drop {bound:g}"
    do = "start another run with a lower learning rate, a larger settings.beta or an additional reward"
    require(value >= best - bound, name, f"{value:.4g} after {best:.4g}", expected, do)


def _means(label: str, prompts: Sequence[Prompt], values: np.ndarray):
    """Yields the mean over all prompts, and over the prompts of each kind."""
    yield f"held_out/{label}", float(known(values).mean())
    kinds: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, values, strict=True):
        kind = prompt.metadata.get("tag") or prompt.metadata.get("kind")
        if kind and np.isfinite(value):
            kinds.setdefault(str(kind), []).append(float(value))
    for kind, own in kinds.items():
        yield f"held_out/{label}/{kind}", float(np.mean(own))


def groups_hook(source: RolloutSource, every: int, group_size: int, directory: str) -> Hook:
    """Saves WORKDIR/samples/STEP-groups.png every so many steps: the best and worst samples of the last rollout."""
    folder = pathlib.Path(directory)

    def run(step: int, state: TrainState, reporter: Reporter) -> None:
        del state
        if jax.process_index() == 0 and source.last is not None:
            sheet = group_sheet(*source.last, group_size)
            save_png(sheet, folder / "samples" / f"{step}-groups.png")
            reporter.image(step, "groups", sheet)

    return Hook(every, run)


def group_sheet(prompts: Sequence[Prompt], images: np.ndarray, rewards: np.ndarray, group_size: int) -> np.ndarray:
    """Draws a row for each of the prompts whose rewards differ most: its best samples, then its worst.

    `images` are uint8[B Y X 3], `rewards` f32[B], and `group_size` is G. Returns uint8[Y X 3].
    """
    values = rewards.reshape(-1, group_size)
    lines = []
    for group in np.argsort(-np.ptp(values, axis=1), kind="stable")[:GROUPS]:
        order = np.argsort(-values[group], kind="stable") + group * group_size
        each = min(EACH, group_size // 2)
        shown = [*order[:each], *order[-each:]]
        prompt = prompts[group]
        references = [np.asarray(image) for image in prompt.references]
        drawn = [*references, *(images[index] for index in shown)]
        numbers = " ".join(f"{rewards[index]:.2f}" for index in shown)
        lines.append(captioned(drawn, f"{numbers}: {prompt.text}", SIDE))
    return grid(lines, 1)
