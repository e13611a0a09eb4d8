"""Evaluation of a model on the demo world: generates images for the prompts of `suite`, which also scores them.

Settings are those of sample.py.
"""

import dataclasses
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from PIL import Image

from blip3o_jax.data import images
from blip3o_jax.demo import sheet, suite
from blip3o_jax.demo.suite import Case
from blip3o_jax.demo.world.render import SMALLEST, render
from blip3o_jax.demo.world.selftest import self_test
from blip3o_jax.evals import readers
from blip3o_jax.evals.report import json_lines
from blip3o_jax.files import writable, write_whole
from blip3o_jax.generate import stages
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.generate.settings import make_settings
from blip3o_jax.pipeline import Pipeline, Settings
from blip3o_jax.sharding import fetch
from blip3o_jax.train.metrics import Reporter
from blip3o_jax.train.run import Hook
from blip3o_jax.train.step import TrainState
from blip3o_jax.version import __version__

OWN_NAME = re.compile(rf"({'|'.join(suite.TASKS)})-\d{{4,}}(-({'|'.join(suite.VERSIONS)}))?\.png")
"""Files that an evaluation writes to `pictures/`; it removes those of an earlier one."""

Images = Iterator[tuple[Case, np.ndarray]]


def takes_references(pipeline: Pipeline) -> bool:
    """Returns whether the model uses more of a reference image than its image tokens."""
    edit = pipeline.config.edit
    return edit.siglip_features or edit.vae_condition or edit.vae_noise


def choose_tasks(pipeline: Pipeline, requested: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Returns the tasks to evaluate, by default all that the model supports, and notes on omitted ones."""
    if requested is not None:
        return list(dict.fromkeys(requested)), []
    if takes_references(pipeline):
        return list(suite.TASKS), []
    note = "omitted: edit, and reconstruct by the whole model - this model uses image tokens of references only"
    return [task for task in suite.TASKS if task != "edit"], [f"{note}; --tasks edit,reconstruct runs them"]


def run_suite(
    pipeline: Pipeline, cases: Sequence[Case], reader: str = "world", whole: bool = True, **settings: Any
) -> list[tuple[dict[str, Any], list[np.ndarray]]]:
    """Generates and scores an image for every case of `suite.build`; other arguments as for `demo`.

    `whole`: also evaluate reconstruction by the whole model.

    Returns:
      Rows of `suite.score` with the `seed` of the image, each with its images uint8[Y X 3]: the reference, if any, and
      the result.
    """
    judged, read = [], readers.open_reader(reader)
    readers.check_legible([case.truth.request.text for case in cases if case.tag == "text"], read, reader)
    kept = [case for case in cases if case.tag == "reconstruct"]
    painted = [case for case in cases if case.tag not in ("edit", "reconstruct")]
    changed = [case for case in cases if case.tag == "edit"]
    jobs = (
        ("images", "model", painted, _answers),
        ("edits", "model", changed, _answers),
        ("autoencoder", "autoencoder", kept, _round_trips),
        ("tokens alone", "tokens", kept, _renderings),
        ("reconstructions", "model", kept if whole else [], _answers),
    )
    for name, version, part, work in jobs:
        if part:
            made, quiet = work(pipeline, part, settings), not sys.stderr.isatty()
            for case, image in tqdm.tqdm(made, name, len(part), leave=False, disable=quiet):
                given = [] if case.given is None else [np.asarray(_image(pipeline, case))]
                row = suite.score(case, image, version, read) | {"seed": _seed(case, settings)}
                judged.append((row, [*given, image]))
    return judged


def _image(pipeline: Pipeline, case: Case) -> Image.Image:
    """Renders the reference of a case at the model's image size, or the smallest size of the demo world."""
    return Image.fromarray(render(case.given, max(pipeline.config.image_size, SMALLEST)))


def _seed(case: Case, settings: Mapping[str, Any]) -> int:
    """Returns the seed of a case; different seeds make the images of a task independent trials."""
    return (Settings(**settings).seed + case.index) % 2**32


def _answers(pipeline: Pipeline, cases: Sequence[Case], settings: Mapping[str, Any]) -> Images:
    task = {"edit": "edit", "reconstruct": "reconstruct"}.get(cases[0].tag, "t2i")
    given = [() if task == "t2i" else (_image(pipeline, case),) for case in cases]
    requests = [Prompt(task, case.prompt, each, seed=_seed(case, settings)) for case, each in zip(cases, given)]
    return _made(cases, pipeline.stream(requests, **settings))


def _renderings(pipeline: Pipeline, cases: Sequence[Case], settings: Mapping[str, Any]) -> Images:
    requests = [Prompt("t2i", "", target=_image(pipeline, case), seed=_seed(case, settings)) for case in cases]
    return _made(cases, pipeline.render(requests, **settings))


def _made(cases: Sequence[Case], results: Iterable[Any]) -> Images:
    images_made = (image for result in results for image in result.images)
    for case, image in zip(cases, images_made, strict=True):
        yield case, np.asarray(image)


def _round_trips(pipeline: Pipeline, cases: Sequence[Case], settings: Mapping[str, Any]) -> Images:
    side, size = pipeline.config.image_size, Settings(**settings).batch_size
    for first in range(0, len(cases), size):
        batch = cases[first : first + size]
        padded = [*batch, *batch[-1:] * (size - len(batch))]
        pixels = np.stack([images.target_pixels(_image(pipeline, case), side, side) for case in padded])
        with pipeline.scope():
            made = images.to_uint8(fetch(stages.round_trip(pipeline.config, pipeline.params, pixels)))
        yield from zip(batch, made[: len(batch)], strict=True)


def demo(
    pipeline: Pipeline,
    directory: str | os.PathLike,
    tasks: Sequence[str] | None = None,
    count: int = 70,
    wording: str = "mixed",
    prompt_seed: int = 1,
    reader: str = "world",
    **settings: Any,
) -> str:
    """Evaluates a model on the demo world and writes the results.

    Args:
      directory: output directory for report.md, scores.json, results.jsonl, contact_sheet.png and pictures/.
      tasks: keys of `suite.TASKS`; None for all that the model supports.
      count, wording, prompt_seed: of the prompts, see `suite.build`.
      reader: a key of `readers.READERS`, to read the signs of the task `text`.
      **settings: fields of `Settings`.

    Returns:
      The report in Markdown.

    Raises:
      UserError: invalid arguments, a directory that cannot be written, or a failed self-test of the verifier.
    """
    directory = pathlib.Path(directory)
    chosen, notes = choose_tasks(pipeline, tasks)
    cases = suite.build(chosen, count, prompt_seed, wording)
    readers.open_reader(reader)
    proof = self_test()
    proof.require()
    whole = tasks is not None or takes_references(pipeline)
    with writable(directory / "pictures"):
        started = time.perf_counter()
        judged = run_suite(pipeline, cases, reader, whole, **settings)
        seconds = time.perf_counter() - started
        facts = {
            "checkpoint_id": pipeline.name,
            "version": __version__,
            "dtype": pipeline.dtype,
            "tasks": chosen,
            "count": count,
            "wording": wording,
            "prompt_seed": prompt_seed,
            "reader": reader,
            "settings": settings,
            "pictures": len(judged),
            "seconds": round(seconds, 1),
            "verifier": str(proof),
        }
        return _write(directory, judged, facts, notes)


def _write(directory: pathlib.Path, judged: Sequence[tuple], facts: dict[str, Any], notes: Sequence[str]) -> str:
    rows, names = [], set()
    for row, shown in judged:
        name = "-".join(filter(None, (row["name"], row.get("version")))) + ".png"
        names.add(name)
        images.save_png(shown[-1], directory / "pictures" / name)
        rows.append({"file": f"pictures/{name}", **row})
    for path in (directory / "pictures").iterdir():  # of an earlier evaluation
        if OWN_NAME.fullmatch(path.name) and path.name not in names:
            path.unlink()
    images.save_png(sheet.contact_sheet(judged), directory / "contact_sheet.png")
    lines = suite.figures(rows)
    figures = {line.name: dataclasses.asdict(line.score) for line in lines}
    write_whole(directory / "results.jsonl", json_lines(rows))
    write_whole(directory / "scores.json", json.dumps({**facts, "figures": figures}, indent=1) + "\n")
    settings = ", ".join(f"{name} {value}" for name, value in facts["settings"].items() if value is not None)
    heading = (
        f"checkpoint {facts['checkpoint_id']}, {facts['dtype']}, {settings}; {facts['wording']} captions, prompt seed "
        f"{facts['prompt_seed']}, text read by {facts['reader']}; {facts['pictures']} images in {facts['seconds']} "
        f"s.\n{facts['verifier']}"
    )
    report = "\n".join([heading, *notes, "", suite.markdown(lines), ""])
    write_whole(directory / "report.md", report)
    return report


def score_hook(
    make_pipeline: Callable[[TrainState], Pipeline],
    every: int,
    count: int = 8,
    tasks: Sequence[str] = ("counting", "position", "color_attr"),
    **settings: Any,
) -> Hook:
    """Builds the hook that scores held-out prompts of the demo world.

    It reports `world/TASK`, fractions in [0, 1] of strictly correct images, and `world/mean` over tasks.

    `make_pipeline` maps a state to its pipeline; `every` counts steps; for `count` and `tasks` see `suite.build`;
    settings are fields of `Settings`.

    Raises:
      UserError: an unknown task, or settings out of range.
    """
    make_settings(**settings)  # reports mistakes before the first step
    suite.check_tasks(tasks, "score.tasks")
    cases = suite.build(tasks, count)

    def run(step: int, state: TrainState, reporter: Reporter) -> dict[str, float]:
        del step, reporter
        hits: dict[str, list[bool]] = {}
        for row, _ in run_suite(make_pipeline(state), cases, **settings):
            name = "-".join(filter(None, (row["tag"], row.get("version"))))
            hits.setdefault(f"world/{name}", []).append(row["hit"])
        shares = {name: float(np.mean(values)) for name, values in hits.items()}
        return {**shares, "world/mean": float(np.mean(list(shares.values())))}

    return Hook(every, run, "world/")
