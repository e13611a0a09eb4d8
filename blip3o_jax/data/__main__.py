"""`python -m blip3o_jax.data check CONFIG`, `... build tfds|arrayrecord SOURCE DESTINATION`, `... precompute`.

Values of a configuration may be changed behind it: `--config.data.sources.NAME.path=PATH`.
"""

import argparse
import ast
import dataclasses
import importlib.util
import os
import sys
from typing import Any

from blip3o_jax.command_line import Parser
from blip3o_jax.config import TokenIds, schema
from blip3o_jax.data import builders, check, files
from blip3o_jax.data.config import DataConfig, Layout, SourceConfig
from blip3o_jax.data.folder import METADATA
from blip3o_jax.data.rows import SUFFIXES
from blip3o_jax.data.sources import SOURCES
from blip3o_jax.data.transforms import MakeRow
from blip3o_jax.errors import UserError, reported
from blip3o_jax.files import read_json
from blip3o_jax.text.tokenizer import Tokenizer

BUILDERS = {"tfds": builders.build_tfds, "arrayrecord": builders.build_arrayrecord}


def main(arguments: list[str] | None = None) -> None:
    """Parses and dispatches."""
    parser = _parser()
    args, more = parser.parse_known_args(arguments, argparse.Namespace(debug=False))
    args.changes = [word for word in more if word.startswith("--config.") and "=" in word]
    unknown = [word for word in more if word not in args.changes or "config" not in args]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    with reported(args.debug):
        args.run(args)


def _parser() -> Parser:
    parser = Parser(prog="python -m blip3o_jax.data", description=__doc__)
    commands = parser.add_subparsers(required=True)

    checked = commands.add_parser("check", help="read a sample of every source and report on it")
    checked.add_argument("config", help="configs/NAME.py[:ARGUMENT] or a JSON file; a bare section `data` will do")
    checked.add_argument("--tokenizer", help="directory of a checkpoint, to count tokens; default: the configuration's")
    checked.add_argument("--samples", type=int, default=256, help="items read per source")
    checked.add_argument("--image_size", type=int, help="side of the target; default: the configuration's, or 1024")
    checked.add_argument(
        "--tokenizer_size", type=int, help="side of the tokenizer's input; default: the configuration's, or 384"
    )
    checked.set_defaults(run=_check)

    build = commands.add_parser("build", help="turn tars, JSONL or a folder into TFDS or ArrayRecord files")
    build.add_argument("format", choices=sorted(BUILDERS))
    build.add_argument("source", help="path or pattern of the source")
    build.add_argument("destination", help="directory to make")
    build.add_argument("--kind", help=f"{' | '.join(SOURCES)} | package.module:attribute; default: from the path")
    build.add_argument("--task", default="t2i", help="t2i, edit, reconstruct or package.module:attribute")
    build.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the source's kind")
    build.add_argument("--max_broken_share", type=float, default=0.01)
    build.set_defaults(run=_build)

    encode = commands.add_parser("precompute", help="write codes and latents, so that training skips the encoders")
    encode.add_argument("--config", required=True, help="configs/NAME.py[:ARGUMENT] or a JSON file, of a joint stage")
    encode.add_argument("--checkpoint", required=True, help="of the encoders: a directory, or hf://org/name")
    encode.add_argument("--output", required=True, help="directory to make, or to continue")
    encode.add_argument("--batch_size", type=int, default=16, help="pictures encoded at a time, over all devices")
    encode.add_argument("--items_per_file", type=int, default=1000, help="what an interruption costs at most")
    encode.add_argument("--latent_dtype", default="float32", help="float32, or float16 for half the size")
    encode.add_argument("--worker", default="0/1", metavar="I/N", help="this one of N processes that share the files")
    encode.set_defaults(run=_precompute)
    return parser


def _check(args: argparse.Namespace) -> None:
    settings = changed(read_config(args.config), args.changes)
    config = schema.from_dict(DataConfig, _data_section(settings), "data")
    if args.samples < 1:
        raise UserError("--samples", got=args.samples, expected="1 or more", do="raise it")
    settings["tokenizer"] = args.tokenizer or settings.get("tokenizer")
    has_model = settings.get("model") or settings.get("init_from")
    is_stage = settings.get("objective") and has_model and not settings.get("rl")
    make_row, tokenizer = (_row_of_stage if is_stage else _row_of_images)(settings, args)
    count_tokens = (lambda text: len(tokenizer.encode(text))) if tokenizer else None
    reports, text = check.check(config, args.samples, make_row, count_tokens)
    print(text)
    check.raise_if_broken(config, reports)


def _row_of_stage(settings: dict[str, Any], args: argparse.Namespace) -> tuple[check.MakeRow, Tokenizer]:
    """What a stage makes of an item, and its text tokenizer."""
    from blip3o_jax import experiment  # brings jax, which other commands do without

    config = experiment.from_settings(settings)
    start = experiment.open_start(config)
    layout = experiment.row_layout(config, start.model)
    side, tokenizer_size = args.image_size or layout.height, args.tokenizer_size or layout.tokenizer_size
    layout = dataclasses.replace(layout, height=side, width=side, tokenizer_size=tokenizer_size)
    tokenizer = Tokenizer.from_directory(start.tokenizer_dir)
    return MakeRow(layout, tokenizer if layout.length else None), tokenizer


def _row_of_images(settings: dict[str, Any], args: argparse.Namespace) -> tuple[check.MakeRow, Tokenizer | None]:
    """As `_row_of_stage`, where no stage is named, or one that learns from prompts: the images alone are made."""
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
    from blip3o_jax import precompute  # brings jax, too

    try:
        worker = tuple(int(number) for number in args.worker.split("/"))
    except ValueError:
        worker = ()
    if len(worker) != 2:
        raise UserError("--worker", got=f"{args.worker!r}", expected="I/N", do="such as 0/4")
    settings = changed(read_config(args.config), args.changes)
    options = precompute.Options(args.batch_size, args.items_per_file, args.latent_dtype, worker)
    for name, directory in precompute.precompute(settings, args.checkpoint, args.output, options).items():
        print(f"{name}: {directory}, a source of the kind arrayrecord for row.precomputed")


def changed(config: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    """A configuration with `--config.KEY.KEY=VALUE` put into place.

    Raises:
      UserError: no such key.
    """
    for change in changes:
        path, _, text = change.removeprefix("--config.").partition("=")
        *parents, name = path.split(".")
        section = config
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if not isinstance(section, dict) or name not in section:
            raise UserError(f"--config.{path}: no such key", expected="one of the configuration", do="correct it")
        try:
            section[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            section[name] = text
    return config


def _options(pairs: list[str]) -> dict[str, Any]:
    options = {}
    for pair in pairs:
        key, found, value = pair.partition("=")
        if not found:
            raise UserError("--option", got=f"{pair!r}", expected="KEY=VALUE", do="write it so")
        options[key] = int(value) if value.isdigit() else value
    return options


def guess_kind(path: str) -> str:
    """Tells the kind of a source from its path.

    Raises:
      UserError: it cannot be told.
    """
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


def read_config(path: str) -> dict[str, Any]:
    """Reads a configuration file as a dictionary.

    Args:
      path: a JSON file, or a Python file with `get_config`, whose argument stands behind a colon.

    Raises:
      UserError: there is no such file, or it is neither.
    """
    file, _, argument = files.place(path).partition(":")
    if not os.path.isfile(file):
        raise UserError(f"{file}: no such file", expected="a configuration", do="check the path")
    if file.endswith(".json"):
        return read_json(file, "configuration")
    spec = importlib.util.spec_from_file_location("blip3o_jax_config_file", file)
    if spec is None:
        raise UserError(f"{file}: of an unknown type", expected=".py or .json", do="rename it")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(file))))
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{file}: no get_config", expected="a function that returns the configuration", do="add it")
    config = module.get_config(argument) if argument else module.get_config()
    return config if isinstance(config, dict) else config.to_dict()


def _data_section(config: dict[str, Any]) -> dict[str, Any]:
    section = config.get("data", config)
    if not isinstance(section, dict) or "sources" not in section:
        raise UserError("data: no section with sources", expected="data.sources", do="give a configuration of training")
    return section


if __name__ == "__main__":
    main()
