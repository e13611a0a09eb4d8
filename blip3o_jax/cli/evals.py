"""`python -m blip3o_jax.evals`: scores a model on the demo world, and generates and scores GenEval images."""

import argparse
import contextlib
import pathlib
from collections.abc import Iterator
from typing import Annotated

from blip3o_jax.cli.flags import SAMPLING, add_model, add_sampling
from blip3o_jax.command_line import Parser, of, seed
from blip3o_jax.compilation import keep_programs
from blip3o_jax.config.schema import Count, Range, Size
from blip3o_jax.demo import suite
from blip3o_jax.demo.world.prompts import WORDINGS
from blip3o_jax.errors import reported, require
from blip3o_jax.evals import detectors, folder, readers, report
from blip3o_jax.files import writable


def parser() -> Parser:
    """The command line."""
    top = Parser(prog="python -m blip3o_jax.evals", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="composition, text, editing and reconstruction on the demo world")
    demo.add_argument("--output_dir", required=True, help="directory for the report, scores, rows and images")
    demo.add_argument(
        "--tasks", help=f"comma-separated tasks: {', '.join(suite.TASKS)}; default: all that the model supports"
    )
    demo.add_argument(
        "--count",
        type=of(Annotated[int, Range(1, 100_000)]),
        default=70,
        help="prompts per composition task, other tasks in proportion; default: 70",
    )
    demo.add_argument("--wording", choices=WORDINGS, default="mixed", help="wording of the captions; default: mixed")
    demo.add_argument("--prompt_seed", type=seed, default=1, help="seed of the prompts; default: 1")
    demo.add_argument(
        "--reader", default="world", help=f"reader of signs: {', '.join(readers.READERS)} or package.module:attribute"
    )
    demo.set_defaults(run=_demo)
    geneval = commands.add_parser("geneval", help="GenEval images in the benchmark's folder layout")
    actions = geneval.add_subparsers(dest="action", required=True)
    generate = actions.add_parser("generate", help="generate the images of a list of prompts")
    generate.add_argument("--prompts", required=True, help="evaluation_metadata.jsonl of your copy of GenEval")
    generate.add_argument("--output_dir", required=True, help="for 00000/metadata.jsonl, 00000/samples/0000.png ...")
    generate.add_argument("--num_images_per_prompt", type=of(Count), default=4, help="default: 4, as in the benchmark")
    generate.add_argument("--height", type=of(Size), help="height in pixels; default: the model's")
    generate.add_argument("--width", type=of(Size), help="width in pixels; default: the model's")
    generate.set_defaults(run=_generate)
    score = actions.add_parser("score", help="score a folder of images")
    score.add_argument("folder", help="folder in GenEval's layout")
    score.add_argument(
        "--detector", default="verifier", help=f"{', '.join(detectors.DETECTORS)} or package.module:attribute"
    )
    score.add_argument("--model", help="directory or name of the detector's network")
    score.add_argument("--clip", help="directory or name of the CLIP model that classifies colours")
    score.add_argument("--output", help="file for the rows; default: FOLDER/results.jsonl")
    score.set_defaults(run=_score)
    for command in (demo, generate):
        add_model(command)
        add_sampling(command)
    return top


def main(arguments: list[str] | None = None) -> None:
    """Parses and dispatches."""
    args = parser().parse_args(arguments)
    with reported(args.debug):
        args.run(args)


@contextlib.contextmanager
def _pipeline(args: argparse.Namespace) -> Iterator[tuple]:
    """Yields the model on all devices and its settings, which are checked before the checkpoint is read."""
    keep_programs()
    import jax

    from blip3o_jax.convert.adapters import weighted
    from blip3o_jax.demo import embedded
    from blip3o_jax.generate.settings import make_settings
    from blip3o_jax.pipeline import Pipeline
    from blip3o_jax.sharding import make_mesh

    settings = {name: getattr(args, name) for name in SAMPLING}
    make_settings(**settings)
    with writable(pathlib.Path(args.output_dir)):
        mesh = make_mesh() if len(jax.devices()) > 1 else None
        checkpoint = embedded.CHECKPOINT if args.checkpoint is None else args.checkpoint
        adapters = dict(weighted(args.adapter or (), args.adapter_scale or ()))
        sources = {name: getattr(args, name) for name in ("image_tokenizer", "diffusion", "backbone")}
        yield Pipeline.from_pretrained(checkpoint, args.dtype, mesh, adapters, **sources), settings


def _demo(args: argparse.Namespace) -> None:
    from blip3o_jax.demo import examination

    tasks = [task.strip() for task in args.tasks.split(",")] if args.tasks is not None else None
    if tasks is not None:
        suite.check_tasks(tasks)
    readers.open_reader(args.reader)
    with _pipeline(args) as (pipeline, settings):
        print(
            examination.demo(
                pipeline, args.output_dir, tasks, args.count, args.wording, args.prompt_seed, args.reader, **settings
            )
        )
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
        result = report.judge_entries(entries, detector, detectors.thresholds_of(detector))
        result.write(output)
    print(f"{note}\n{result.table()}\nrows: {output}")
