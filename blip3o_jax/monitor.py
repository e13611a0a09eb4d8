"""Monitoring hooks of a training run: validation loss, images of fixed prompts, curves, and scores.

A hook that samples builds a pipeline from the current parameters for a single call, because the next step donates them.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from blip3o_jax import curves, masked, sharding
from blip3o_jax.config import Blip3oConfig, registry
from blip3o_jax.config.model import Guidance, Steps
from blip3o_jax.config.schema import Count
from blip3o_jax.data import images
from blip3o_jax.errors import require
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.generate.settings import check_requests, completed, make_settings
from blip3o_jax.pipeline import Pipeline
from blip3o_jax.text.tokenizer import Tokenizer
from blip3o_jax.train.metrics import Reporter
from blip3o_jax.train.run import Hook, Run
from blip3o_jax.train.step import TrainState, make_evaluation

MakePipeline = Callable[[TrainState], Pipeline]

DIRECTORY, PROGRESS = "samples", "progress.png"  # in the workdir, and the sheet of all steps in it
PROGRESS_ROWS = 12  # most steps on that sheet, evenly spaced
COLUMNS = 4  # images in a row of a sheet
SCORE = "blip3o_jax.demo.examination:score_hook"
"""Function that builds the hook for scores on the demo world."""


@dataclasses.dataclass(frozen=True)
class SamplesConfig:
    """Images of fixed prompts and seeds during training, in WORKDIR/samples."""

    prompts: tuple[str, ...]
    every: Count = 1000
    num_inference_steps: Steps | None = None  # default as in `generate.settings.Settings`
    guidance_scale: Guidance | None = None  # default as in `generate.settings.Settings`
    use_ema: bool = False


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """Accuracy on held-out prompts of the demo world, according to its verifier."""

    every: Count = 1000
    count: Count = 8  # prompts of each composition task
    tasks: tuple[str, ...] = ("counting", "position", "color_attr")  # keys of demo.suite.TASKS
    num_inference_steps: Steps | None = None  # default as in `generate.settings.Settings`
    guidance_scale: Guidance | None = None  # default as in `generate.settings.Settings`
    use_ema: bool = False


def validation_hook(
    run: Run, batches: Callable[[], Iterable[Any]], every: int, seed: int = 0, use_ema: bool = False
) -> Hook:
    """Builds the hook that reports `val_loss`, its terms `val_loss_*`, and the metrics of the objective as `val_*`.

    `batches` returns the held-out batches of this process, equal at every call and as many on every process.
    """
    shardings = None if run.mesh is None else NamedSharding(run.mesh, PartitionSpec())
    evaluate = jax.jit(make_evaluation(run.loss_fn, seed, run.reparametrise), out_shardings=shardings)

    def evaluation(step: int, state: TrainState, reporter: Reporter) -> dict[str, float]:
        del step, reporter
        total: dict[str, Any] = {}
        coefficients: dict[str, Any] = {}
        for index, batch in enumerate(batches()):
            params = state.ema if use_ema else state.params
            metrics, coefficients = evaluate(params, run.frozen, sharding.shard_batch(batch, run.mesh), index)
            total = masked.add_metrics(total, jax.device_get(metrics))
        means = masked.averages(total)
        loss = sum(float(factor) * means.get(name, 0.0) for name, factor in coefficients.items())
        return {"val_loss": loss, **{f"val_{name}": value for name, value in means.items()}}

    return Hook(every, evaluation, "val_")


def pipeline_of(model: Blip3oConfig, run: Run, tokenizer: Tokenizer, use_ema: bool = False) -> MakePipeline:
    """Returns a function that builds a pipeline from a training state."""

    def make(state: TrainState) -> Pipeline:
        trained = state.ema if use_ema else state.params
        return Pipeline(model, run.whole(trained), tokenizer, run.mesh)

    return make


def score_hook(score: ScoreConfig, model: Blip3oConfig, run: Run, tokenizer: Tokenizer) -> Hook:
    """Builds the hook for the scores configured in an experiment."""
    settings = {name: getattr(score, name) for name in ("num_inference_steps", "guidance_scale")}
    completed(model, make_settings(**settings))  # reports mistakes before the first step
    make = pipeline_of(model, run, tokenizer, score.use_ema)
    return registry.resolve({}, SCORE, "score")(make, score.every, score.count, score.tasks, **settings)


def samples_hook(
    samples: SamplesConfig, model: Blip3oConfig, run: Run, tokenizer: Tokenizer, workdir: str | pathlib.Path
) -> Hook:
    """Builds the hook that samples fixed prompts with fixed seeds, as WORKDIR/samples/STEP.png and progress.png.

    Raises:
      UserError: no prompts, one that the model does not take, or settings out of range.
    """
    settings = {name: getattr(samples, name) for name in ("num_inference_steps", "guidance_scale")}
    require(samples.prompts, "samples.prompts", "none", "at least one", "give a prompt or leave samples out")
    requests = [Prompt("t2i", prompt) for prompt in samples.prompts]
    check_requests(model, tokenizer, requests, make_settings(**settings))  # reports mistakes before the first step
    folder = pathlib.Path(workdir) / DIRECTORY
    make_pipeline = pipeline_of(model, run, tokenizer, samples.use_ema)

    def sample(step: int, state: TrainState, reporter: Reporter) -> None:
        made = make_pipeline(state).answer(requests, **settings).images
        sheet = images.grid([np.asarray(image) for image in made], COLUMNS)
        if jax.process_index() == 0:
            images.save_png(sheet, folder / f"{step}.png")
            images.save_png(_progress(folder), folder / PROGRESS)
            reporter.image(step, DIRECTORY, sheet)

    return Hook(samples.every, sample)


def _progress(folder: pathlib.Path) -> np.ndarray:
    """Stacks the sheets in a folder in the order of their steps: uint8[Y X 3]."""
    steps = sorted(int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal())
    count = min(len(steps), PROGRESS_ROWS)
    shown = [steps[i] for i in np.linspace(0, len(steps) - 1, count).round().astype(int)]
    sheets = [np.asarray(images.load_image(str(folder / f"{step}.png"))) for step in shown]
    return np.concatenate([sheet for sheet in sheets if sheet.shape[1] == sheets[-1].shape[1]])


def curves_hook(every: int, directory: str | pathlib.Path, wanted: Callable[[str], bool]) -> Hook:
    """Builds a hook that plots the `wanted` entries of the run's records over its steps, as DIRECTORY/curves.png."""
    folder = pathlib.Path(directory)

    def run(step: int, state: TrainState, reporter: Reporter) -> None:
        del step, state, reporter
        records = curves.read_records(folder) if jax.process_index() == 0 else []
        names = [name for name in curves.learnt(records) if wanted(name)]
        if names:
            images.save_png(curves.draw({folder.name: records}, names), folder / "curves.png")

    return Hook(every, run)
