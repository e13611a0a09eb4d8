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
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from PIL import Image

from blip3o_jax.data import images
from blip3o_jax.demo import sheet, suite
from blip3o_jax.demo.suite import Case
from blip3o_jax.demo.world.render import SMALLEST, render
from blip3o_jax.demo.world.selftest import self_test
from blip3o_jax.detection import Reader
from blip3o_jax.evals import readers
from blip3o_jax.evals.report import json_lines
from blip3o_jax.files import read_json, writable, write_whole
from blip3o_jax.generate import stages
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.generate.settings import make_settings
from blip3o_jax.pipeline import Pipeline, Settings, origin
from blip3o_jax.sharding import fetch
from blip3o_jax.train.metrics import Reporter
from blip3o_jax.train.run import Hook
from blip3o_jax.train.step import TrainState
from blip3o_jax.version import __version__

OWN_NAME = re.compile(rf"({'|'.join(suite.TASKS)})-\d{{4,}}(-({'|'.join(suite.VERSIONS)}))?\.png")
"""Files that an evaluation writes to `pictures/`; it removes those of another one."""

EVALUATION = "evaluation.json"  # what the pictures depend on
RESULTS = ("report.md", "scores.json", "results.jsonl", "contact_sheet.png")
Images = Iterator[tuple[Case, np.ndarray]]
Judged = list[tuple[dict[str, Any], list[np.ndarray]]]


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
) -> Judged:
    """Generates and scores an image for every case of `suite.build`; other arguments as for `demo`.

    `whole`: also evaluate reconstruction by the whole model.

    Returns:
      Rows of `suite.score` with the `seed` of the image, each with its images uint8[Y X 3]: the reference, if any, and
      the result.
    """
    read = _reader(cases, reader)
    return [_judge(pipeline, *made, read, settings) for made in _generate(pipeline, cases, whole, (), settings)]


def _reader(cases: Sequence[Case], name: str) -> Reader:
    """Opens a reader, which must know the characters of all signs."""
    read = readers.open_reader(name)
    readers.check_legible([case.truth.request.text for case in cases if case.tag == "text"], read, name)
    return read


def _versions(case: Case, whole: bool) -> list[str]:
    """Returns the ways, keys of `suite.VERSIONS`, in which the image of a case is made."""
    return ["model"] if case.tag != "reconstruct" else [*suite.VERSIONS][: None if whole else -1]


def _file(case: Case, version: str) -> str:
    return f"{case.name}-{version}.png" if case.tag == "reconstruct" else f"{case.name}.png"


def _generate(
    pipeline: Pipeline, cases: Sequence[Case], whole: bool, done: Container[str], settings: Mapping[str, Any]
) -> Iterator[tuple[Case, str, np.ndarray]]:
    """Yields case, version and image uint8[Y X 3] for all images but those of the files in `done`."""
    kept = [case for case in cases if case.tag == "reconstruct"]
    painted = [case for case in cases if case.tag not in ("edit", "reconstruct")]
    changed = [case for case in cases if case.tag == "edit"]
    jobs = (
        ("images", "model", painted, _answers),
        ("edits", "model", changed, _answers),
        ("autoencoder", "autoencoder", kept, _round_trips),
        ("tokens alone", "tokens", kept, _renderings),
        ("reconstructions", "model", kept, _answers),
    )
    for name, version, part, work in jobs:
        if todo := [case for case in part if version in _versions(case, whole) and _file(case, version) not in done]:
            made, quiet = work(pipeline, todo, settings), not sys.stderr.isatty()
            for case, image in tqdm.tqdm(made, name, len(todo), leave=False, disable=quiet):
                yield case, version, image


def _judge(
    pipeline: Pipeline, case: Case, version: str, image: np.ndarray, read: Reader, settings: Mapping[str, Any]
) -> tuple[dict[str, Any], list[np.ndarray]]:
    given = [] if case.given is None else [np.asarray(_image(pipeline, case))]
    return suite.score(case, image, version, read) | {"seed": _seed(case, settings)}, [*given, image]


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

    Images are written as they are made. An interrupted evaluation resumes if called again with the same arguments;
    with others, it replaces the one in the directory.

    Args:
      directory: output directory for report.md, scores.json, results.jsonl, contact_sheet.png, pictures/ and
        evaluation.json.
      tasks: keys of `suite.TASKS`; None for all that the model supports.
      count, wording, prompt_seed: of the prompts, see `suite.build`.
      reader: a key of `readers.READERS`, to read the signs of the task `text`.
      **settings: fields of `Settings`.

    Returns:
      The report in Markdown.

    Raises:
      UserError: invalid arguments, a directory that cannot be written or has a damaged file, or a failed self-test of
        the verifier.
    """
    directory = pathlib.Path(directory)
    chosen, notes = choose_tasks(pipeline, tasks)
    cases = suite.build(chosen, count, prompt_seed, wording)
    read = _reader(cases, reader)
    proof = self_test()
    proof.require()
    whole = tasks is not None or takes_references(pipeline)
    asked = {"version": __version__, "tasks": chosen, "count": count, "wording": wording, "prompt_seed": prompt_seed}
    asked |= {"whole": whole} | origin(pipeline, make_settings(**settings))
    with writable(directory / "pictures"):
        done, started = _claim(directory, asked), time.perf_counter()
        wanted = [(case, version) for case in cases for version in _versions(case, whole)]
        if done:
            print(f"{len(done)} of {len(wanted)} images are in {directory} already")
        for case, version, image in _generate(pipeline, cases, whole, done, settings):
            images.save_png(image, directory / "pictures" / _file(case, version))
        seconds = time.perf_counter() - started
        judged = []
        for case, version in wanted:
            file = f"pictures/{_file(case, version)}"
            image = np.asarray(images.load_image(directory / file))
            row, shown = _judge(pipeline, case, version, image, read, settings)
            judged.append(({"file": file, **row}, shown))
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
            "made": len(judged) - len(done),
            "seconds": round(seconds, 1),
            "verifier": str(proof),
        }
        return _write(directory, judged, facts, notes)


def _claim(directory: pathlib.Path, asked: dict[str, Any]) -> set[str]:
    """Returns the pictures of an evaluation with the same facts; removes the files of any other, and records the facts.

    The record is removed first and written last, so that pictures beside it are its own.
    """
    record, pictures = directory / EVALUATION, directory / "pictures"
    own = {path.name for path in pictures.iterdir() if OWN_NAME.fullmatch(path.name)}
    if record.is_file():
        found = read_json(record, "evaluation")
        different = [f"{name} {found.get(name)}" for name in asked if found.get(name) != asked[name]]
        if not different:
            return own
        print(f"replaced in {directory}: an evaluation with {', '.join(different)}")
    for name in (EVALUATION, *RESULTS, *(f"pictures/{name}" for name in own)):
        (directory / name).unlink(missing_ok=True)
    write_whole(record, json.dumps(asked, indent=1) + "\n")
    return set()


def _write(directory: pathlib.Path, judged: Judged, facts: dict[str, Any], notes: Sequence[str]) -> str:
    rows = [row for row, _ in judged]
    images.save_png(sheet.contact_sheet(judged), directory / "contact_sheet.png")
    lines = suite.figures(rows)
    figures = {line.name: dataclasses.asdict(line.score) for line in lines}
    write_whole(directory / "results.jsonl", json_lines(rows))
    write_whole(directory / "scores.json", json.dumps({**facts, "figures": figures}, indent=1) + "\n")
    settings = ", ".join(f"{name} {value}" for name, value in facts["settings"].items() if value is not None)
    made = f"{facts['pictures']} images"
    made += "" if facts["made"] == facts["pictures"] else f", {facts['made']} of them made"
    heading = (
        f"checkpoint {facts['checkpoint_id']}, {facts['dtype']}, {settings}; {facts['wording']} captions, prompt seed "
        f"{facts['prompt_seed']}, text read by {facts['reader']}; {made} in {facts['seconds']} s.\n{facts['verifier']}"
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
