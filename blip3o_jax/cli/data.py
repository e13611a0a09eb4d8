"""`python -m blip3o_jax.data check CONFIG`, `... build tfds|arrayrecord SOURCE DESTINATION`, `... precompute`.

Override values of the configuration with `--config.data.sources.NAME.path=PATH`.
"""

import argparse
import dataclasses
import os
import re
from typing import Any

from blip3o_jax.cli import configuration
from blip3o_jax.command_line import Parser, of
from blip3o_jax.config import TokenIds, schema
from blip3o_jax.config.schema import Count, Share, Size
from blip3o_jax.data import builders, check, files
from blip3o_jax.data.config import DataConfig, Layout, SourceConfig
from blip3o_jax.data.folder import METADATA
from blip3o_jax.data.rows import SUFFIXES
from blip3o_jax.data.sources import SOURCES
from blip3o_jax.data.transforms import MakeRow
from blip3o_jax.errors import UserError, nearest, reported, require
from blip3o_jax.text.tokenizer import Tokenizer

BUILDERS = {"tfds": builders.build_tfds, "arrayrecord": builders.build_arrayrecord}


def main(arguments: list[str] | None = None) -> None:
    args = configuration.parse(parser(), arguments)
    with reported(args.debug):
        args.run(args)


def parser() -> Parser:
    top = Parser(prog="python -m blip3o_jax.data", description=__doc__)
    commands = top.add_subparsers(required=True)

    checked = commands.add_parser("check", help="read a sample of every source and report what training would see")
    checked.set_defaults(run=_check)
    add = checked.add_argument
    add("config", help="configs/NAME.py[:ARGUMENT] or a JSON file; may be a `data` section only")
    add("--tokenizer", help="checkpoint directory, to count tokens; default: the configuration's")
    add("--samples", type=of(Count), default=256, help="items to read per source; default: 256")
    add("--image_size", type=of(Size), help="side of the target; default: the configuration's, or 1024")
    add("--tokenizer_size", type=of(Size), help="side of the tokenizer's input; default: the configuration's, or 384")

    build = commands.add_parser("build", help="convert a source to TFDS or ArrayRecord files")
    build.set_defaults(run=_build)
    add = build.add_argument
    add("format", choices=sorted(BUILDERS))
    add("source", help="path or pattern of the source")
    add("destination", help="directory to create")
    add("--kind", help=f"{' | '.join(SOURCES)} | package.module:attribute; default: from the path")
    add("--task", default="t2i", help="t2i, edit, reconstruct or package.module:attribute")
    add("--option", action="append", default=[], metavar="KEY=VALUE", help="option of the source")
    add("--max_broken_share", type=of(Share), default=0.01, help="largest fraction of broken items; default: 0.01")

    encode = commands.add_parser("precompute", help="write codes and latents, so that training skips the encoders")
    encode.set_defaults(run=_precompute)
    add = encode.add_argument
    add("--config", required=True, help="configs/NAME.py[:ARGUMENT] or a JSON file, of a joint stage")
    add("--checkpoint", required=True, help="checkpoint of the encoders: a directory, or hf://org/name")
    add("--output", required=True, help="new directory, or one to resume")
    add("--batch_size", type=of(Count), default=16, help="images per batch, over all devices")
    add("--items_per_file", type=of(Count), default=1000, help="items per file")
    add("--latent_dtype", choices=("float32", "float16"), default="float32", help="float16: half the size")
    add("--worker", default="0/1", metavar="I/N", help="index of this process of N that share files")
    return top


def _check(args: argparse.Namespace) -> None:
    settings = configuration.read(args.config, args.changes, with_paths=True)
    _refuse_unknown(settings, configuration.read(args.config))
    section = settings.get("data", settings)
    if not isinstance(section, dict) or "sources" not in section:
        raise UserError("data: no section with sources", expected="data.sources", do="give a configuration of training")
    config = schema.from_dict(DataConfig, section, "data")
    settings["tokenizer"] = args.tokenizer or settings.get("tokenizer")
    has_model = settings.get("model") or settings.get("init_from")
    is_stage = settings.get("objective") and has_model and not settings.get("rl")
    make_row, tokenizer = (_row_of_stage if is_stage else _row_of_images)(settings, args)
    count_tokens = (lambda text: len(tokenizer.encode(text))) if tokenizer else None
    reports, text = check.check(config, args.samples, make_row, count_tokens)
    print(text)
    check.raise_if_broken(config, reports)


def _refuse_unknown(settings: dict[str, Any], before: dict[str, Any]) -> None:
    """Refuses overrides of unknown sections, since this command does not read all sections."""
    if new := settings.keys() - before.keys():
        from blip3o_jax.experiment.config import ExperimentConfig  # imports jax, otherwise not needed here

        known = [field.name for field in dataclasses.fields(ExperimentConfig)]
        for name in new.difference(known, (field.name for field in dataclasses.fields(DataConfig))):
            do = nearest(name, known, f"known: {', '.join(sorted(known))}")
            raise UserError(f"--config.{name}: no such key", expected="one of the configuration", do=do)


def _row_of_stage(settings: dict[str, Any], args: argparse.Namespace) -> tuple[check.MakeRow, Tokenizer]:
    """Returns the transformation of items to rows of a training stage, and its text tokenizer."""
    from blip3o_jax import experiment  # imports jax, otherwise not needed here

    config = experiment.from_settings(settings)
    start = experiment.open_start(config)
    layout = experiment.row_layout(config, start.model)
    side, tokenizer_size = args.image_size or layout.height, args.tokenizer_size or layout.tokenizer_size
    layout = dataclasses.replace(layout, height=side, width=side, tokenizer_size=tokenizer_size)
    tokenizer = Tokenizer.from_directory(start.tokenizer_dir)
    return MakeRow(layout, tokenizer if layout.length else None), tokenizer


def _row_of_images(settings: dict[str, Any], args: argparse.Namespace) -> tuple[check.MakeRow, Tokenizer | None]:
    """Returns the same as `_row_of_stage` for images only: no stage, or reinforcement learning."""
    model = settings.get("model") or {}
    side = args.image_size or model.get("image_size", 1024)
    tokenizer_size = args.tokenizer_size or model.get("image_tokenizer", {}).get("image_size", 384)
    layout = Layout((), side, side, tokenizer_size, num_image_tokens=1, tokens=TokenIds(0, 1, 2, 1, 3, 1, 0))
    directory = settings["tokenizer"]
    return check.images_row(layout), Tokenizer.from_directory(directory) if directory else None


def _build(args: argparse.Namespace) -> None:
    source = SourceConfig(args.kind or guess_kind(args.source), args.source, args.task, options=_options(args.option))
    written, left_out = BUILDERS[args.format](
        schema.checked(source, "source"), files.place(args.destination), args.max_broken_share
    )
    print(f"{args.destination}: {written} items written, {left_out} broken ones left out")


def _precompute(args: argparse.Namespace) -> None:
    from blip3o_jax import precompute  # imports jax

    parts = re.fullmatch(r"(\d{1,9})/(\d{1,9})", args.worker)
    worker = tuple(map(int, parts.groups())) if parts else (0, 0)
    require(worker[0] < worker[1], "--worker", f"{args.worker!r}", "I/N with 0 <= I < N", "such as 0/4")
    settings = configuration.read(args.config, args.changes, with_paths=True)
    options = precompute.Options(args.batch_size, args.items_per_file, args.latent_dtype, worker)
    for name, directory in precompute.precompute(settings, args.checkpoint, args.output, options).items():
        print(f"{name}: {directory}, a source of kind arrayrecord for row.precomputed")


def _options(pairs: list[str]) -> dict[str, Any]:
    options = {}
    for pair in pairs:
        key, found, value = pair.partition("=")
        require(found, "--option", f"{pair!r}", "KEY=VALUE", "correct it")
        options[key] = int(value) if value.isdigit() else value
    return options


def guess_kind(path: str) -> str:
    """Infers the kind of a source from its path; raises UserError if the path does not determine it."""
    path = files.place(path)
    endings = {".tar": "webdataset", ".array_record": "arrayrecord", ".jsonl": "jsonl"}
    if os.path.isdir(path):
        names = sorted(os.listdir(path))
        names = [] if {*METADATA} & {*names} else names
    else:
        names = [path]
        endings |= dict.fromkeys(SUFFIXES, "jsonl")
    for name in names:
        if kind := endings.get(os.path.splitext(name)[1].lower()):
            return kind
    if os.path.isdir(path):
        return "folder"
    raise UserError(
        f"{path}: of no known kind", expected=".tar, .jsonl, .json, .csv, .array_record or a folder", do="give --kind"
    )
