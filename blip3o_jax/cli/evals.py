"""`python -m blip3o_jax.evals`: scores a model on the demo world, and generates and scores GenEval images."""

import argparse
import contextlib
import pathlib
from collections.abc import Iterator
from typing import Annotated

from blip3o_jax.cli.flags import SAMPLING, add_model, add_sampling, named_model
from blip3o_jax.command_line import Parser, of, seed
from blip3o_jax.compilation import keep_programs
from blip3o_jax.config.schema import Count, Range, Size
from blip3o_jax.demo import suite
from blip3o_jax.demo.world.prompts import WORDINGS
from blip3o_jax.errors import reported, require
from blip3o_jax.evals import detectors, folder, readers, report
from blip3o_jax.files import writable
from blip3o_jax.version import __version__


def parser() -> Parser:
    top = Parser(prog="python -m blip3o_jax.evals", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="composition, text, editing and reconstruction on the demo world")
    demo.set_defaults(run=_demo)
    add, known = demo.add_argument, ", ".join(suite.TASKS)
    add("--output_dir", required=True, help="directory for the report, scores, rows and images; rerun to resume")
    add("--tasks", help=f"comma-separated tasks: {known}; default: all that the model supports")
    add("--count", type=of(Annotated[int, Range(1, 100_000)]), default=70, help="prompts per composition task, other "
        "tasks in proportion; default: 70")  # fmt: skip
    add("--wording", choices=WORDINGS, default="mixed", help="wording of the captions; default: mixed")
    add("--prompt_seed", type=seed, default=1, help="seed of the prompts; default: 1")
    add("--reader", default="world", help=f"reader of signs: {', '.join(readers.READERS)} or package.module:attribute")
    geneval = commands.add_parser("geneval", help="GenEval images in the benchmark's folder layout")
    actions = geneval.add_subparsers(dest="action", required=True)
    generate = actions.add_parser("generate", help="generate the images of a list of prompts")
    generate.set_defaults(run=_generate)
    add = generate.add_argument
    add("--prompts", required=True, help="evaluation_metadata.jsonl of your copy of GenEval")
    add("--output_dir", required=True, help="for 00000/metadata.jsonl, 00000/samples/0000.png ...")
    add("--num_images_per_prompt", type=of(Count), default=4, help="default: 4, as in the benchmark")
    add("--height", type=of(Size), help="height in pixels; default: the model's")
    add("--width", type=of(Size), help="width in pixels; default: the model's")
    score = actions.add_parser("score", help="score a folder of images")
    score.set_defaults(run=_score)
    add, known = score.add_argument, ", ".join(detectors.DETECTORS)
    add("folder", help="folder in GenEval's layout")
    add("--detector", default="verifier", help=f"{known} or package.module:attribute; default: verifier")
    add("--model", help="directory or name of the detector's network")
    add("--clip", help="directory or name of the CLIP model that classifies colours")
    add("--output", help="file for the rows; default: FOLDER/results.jsonl")
    for command in (demo, generate):
        add_model(command)
        add_sampling(command)
    return top


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    with reported(args.debug):
        args.run(args)


@contextlib.contextmanager
def _pipeline(args: argparse.Namespace) -> Iterator[tuple]:
    """Yields the model on all devices and its settings, which are checked before the checkpoint is read."""
    keep_programs()
    from blip3o_jax.generate.settings import make_settings
    from blip3o_jax.pipeline import Pipeline
    from blip3o_jax.sharding import default_mesh

    settings = {name: getattr(args, name) for name in SAMPLING}
    make_settings(**settings)
    with writable(pathlib.Path(args.output_dir)):
        yield Pipeline.from_pretrained(dtype=args.dtype, mesh=default_mesh(), **named_model(args)), settings


def _demo(args: argparse.Namespace) -> None:
    from blip3o_jax.demo import examination

    tasks = None if args.tasks is None else [task.strip() for task in args.tasks.split(",")]
    if tasks is not None:
        suite.check_tasks(tasks)
    readers.open_reader(args.reader)
    with _pipeline(args) as (pipeline, settings):
        asked = (args.output_dir, tasks, args.count, args.wording, args.prompt_seed, args.reader)
        print(examination.demo(pipeline, *asked, **settings))
    print(f"rows, scores, contact sheet and images: {args.output_dir}")


def _generate(args: argparse.Namespace) -> None:
    from blip3o_jax import evaluation

    with _pipeline(args) as (pipeline, settings):
        settings |= {name: getattr(args, name) for name in ("num_images_per_prompt", "height", "width")}
        count = evaluation.generate_geneval(pipeline, args.prompts, args.output_dir, **settings)
    print(f"{count} prompts, {count * args.num_images_per_prompt} images: {args.output_dir}")


def _score(args: argparse.Namespace) -> None:
    place = pathlib.Path(args.folder)
    require(place.is_dir(), "GenEval folder", f"no directory {place}", "00000, 00001 ... in it", "check it")
    output = place / "results.jsonl" if args.output is None else pathlib.Path(args.output)
    require(not output.is_dir(), "--output", f"the directory {output}", "a file", "name one")
    with writable(output.parent):
        detector = detectors.open_detector(args.detector, args.model, args.clip)
        entries = folder.read_folder(place)
        detectors.check_known([entry.metadata for entry in entries], detector, args.detector)
        note = detectors.load(detector)
        asked = {name: getattr(args, name) for name in ("detector", "model", "clip")} | {"version": __version__}
        partial = report.Partial(output.with_name(f"{output.name}.part"), asked)
        if partial.found:
            print(f"{partial.found} images are scored in {output}.part already; delete it to score them again")
        result = report.judge_entries(entries, detector, detectors.thresholds_of(detector), partial)
        result.write(output)
        partial.remove()
    print(f"{note}\n{result.table()}\nrows: {output}")
