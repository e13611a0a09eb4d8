"""`python -m blip3o_jax.convert`: converts checkpoints between the released layout and the native one.

Also assembles checkpoints from published parts, averages and prunes them, merges adapters, and writes random weights.
"""

import argparse
import collections
import os
import pathlib
from collections.abc import Mapping
from typing import Annotated

from blip3o_jax.cli.flags import BACKBONE, add_parts
from blip3o_jax.command_line import Parser, of, seed
from blip3o_jax.config.schema import Natural, Range
from blip3o_jax.errors import UserError, reported

GIGABYTES = of(Annotated[float, Range(1e-6, 1e6)])
LICENCES = (
    "check the licences: SANA weights NVIDIA NSCL/Gemma terms, BLIP3o-NEXT weights CC BY-NC 4.0 as listed by third "
    "parties; a conversion does not change them"
)


def parser() -> Parser:
    top = Parser(prog="python -m blip3o_jax.convert", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    add = commands.add_parser("import", help="released layout -> native layout")
    add.add_argument("source", help="directory, or hf://org/name")
    add.add_argument("target", type=pathlib.Path, help="a new directory")
    add_parts(add)
    add.add_argument("--allow_nonfinite", action="store_true", help="accept NaN and infinite weights")
    add = commands.add_parser("export", help="native layout -> released layout")
    add.add_argument("source", help="directory, or hf://org/name")
    add.add_argument("target", type=pathlib.Path, help="a new directory")
    add.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: each tensor's dtype when imported")
    add.add_argument("--shard_gb", type=GIGABYTES, default=5.0, help="most GB per weight file; default: 5")
    add.add_argument("--backbone", help=BACKBONE)
    add = commands.add_parser("assemble", help="Qwen3 + SANA + DC-AE + TA-Tok -> native layout, to train from")
    add.add_argument("--decoder", required=True, help="Qwen3: directory with weights and tokenizer")
    add.add_argument("--diffusion", required=True, help="SANA-1.5 diffusers folder: transformer/, scheduler/, vae/")
    add.add_argument("--autoencoder", help="DC-AE diffusers folder; default: vae/ of --diffusion")
    add.add_argument("--image_tokenizer", required=True, help="ta_tok.pth")
    add.add_argument("target", type=pathlib.Path, help="a new directory")
    add.add_argument("--preset", help="geometry that the parts must match; determines the editing mode")
    add.add_argument("--project_codebook", action="store_true", help="start rows of image codes at TA-Tok's codebook")
    add.add_argument("--seed", type=seed, default=0, help="seed of connectors and new embedding rows; default: 0")
    add = commands.add_parser("average", help="average the weights of models of one geometry -> native layout")
    add.add_argument("sources", nargs="+", help="two or more directories, in either layout")
    add.add_argument("target", type=pathlib.Path, help="a new directory")
    add.add_argument("--backbone", help=BACKBONE)
    add = commands.add_parser("merge", help="merge adapters into the weights of a checkpoint -> native layout")
    add.add_argument("source", help="directory, or hf://org/name")
    add.add_argument("target", type=pathlib.Path, help="a new directory")
    add.add_argument("--adapter", action="append", required=True, help="in PEFT's or diffusers' format; repeatable")
    add.add_argument("--adapter_scale", action="append", type=float, help="scales: one, or one for each; default: 1")
    add.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: that of each tensor in the base")
    add.add_argument("--backbone", help=BACKBONE)
    add = commands.add_parser("prune", help="drop blocks of the diffusion transformer -> native layout, to fine-tune")
    add.add_argument("source", help="directory, or hf://org/name")
    add.add_argument("target", type=pathlib.Path, help="a new directory")
    add.add_argument("--blocks", nargs="+", type=of(Natural), required=True, help="blocks to keep, from 0")
    add = commands.add_parser("random", help="write random weights in the geometry of a preset, released layout")
    add.add_argument("preset", help="such as blip3o-next-3b or tiny")
    add.add_argument("target", type=pathlib.Path, help="a new directory")
    add.add_argument("--seed", type=seed, default=0, help="random seed; default: 0")
    add.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: bfloat16")
    add.add_argument("--shard_gb", type=GIGABYTES, default=5.0, help="most GB per weight file; default: 5")
    return top


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # conversion runs on the host
    with reported(args.debug):
        commands = (_import, _export, _assemble, _average, _merge, _prune, _random)
        {command.__name__.lstrip("_"): command for command in commands}[args.command](args)


def _import(args: argparse.Namespace) -> None:
    from blip3o_jax.convert import checkpoint

    opened = checkpoint.open_checkpoint(args.source, args.image_tokenizer, args.diffusion)
    if not isinstance(opened, checkpoint.ReleasedCheckpoint):
        what = f"{args.source}: in the native layout already"
        raise UserError(what, expected="the released layout", do="nothing to import")
    plan = checkpoint.import_checkpoint(opened, args.target, not args.allow_nonfinite)
    print(report(plan, opened.source))
    print(f"wrote {args.target} (id {opened.identity}); {LICENCES}")


def _export(args: argparse.Namespace) -> None:
    from blip3o_jax.convert import checkpoint, export, released

    opened = checkpoint.open_checkpoint(args.source, backbone=args.backbone)
    checkpoint.check_backbone(opened, args.backbone)
    if not isinstance(opened, checkpoint.NativeCheckpoint):
        what = f"{args.source}: in the released layout already"
        raise UserError(what, expected="the native layout", do="nothing to export")
    plan = export.export_checkpoint(opened, args.target, args.dtype, int(args.shard_gb * 1e9))
    print(report(plan, released.open_released(args.target).source))
    print(f"wrote {args.target}; {LICENCES}")


def _assemble(args: argparse.Namespace) -> None:
    from blip3o_jax.config.presets import preset
    from blip3o_jax.convert.assemble import Pieces, assemble

    pieces = Pieces(args.decoder, args.diffusion, args.image_tokenizer, args.autoencoder)
    geometry = None if args.preset is None else preset(args.preset)
    made = assemble(pieces, args.target, geometry, args.project_codebook, args.seed)
    ids = made.config.tokens
    print(report(made.plan, made.info))
    codes = "the tokenizer's codebook, projected" if args.project_codebook else "the mean of the rows before"
    print(
        f"embedding: rows 0 to {made.kept_rows - 1} are the decoder's, tags {ids.image_start_tag} and "
        f"{ids.image_end_tag}, scales from {ids.scale_start}, {ids.num_image_tokens} codes from {ids.image_start}: "
        f"{codes}"
    )
    print(f"wrote {args.target}; {LICENCES}")


def _average(args: argparse.Namespace) -> None:
    from blip3o_jax.convert.average import average

    average(args.sources, args.target, args.backbone)
    print(f"wrote {args.target}: the mean of {len(args.sources)} models")


def _merge(args: argparse.Namespace) -> None:
    from blip3o_jax.convert import adapters, native, staging
    from blip3o_jax.pipeline import open_model

    wanted = dict(adapters.weighted(args.adapter, args.adapter_scale or ()))
    opened, loaded = open_model(args.source, wanted, backbone=args.backbone)
    staging.check_target(args.target)
    params = adapters.with_adapters(opened.load_params(param_dtype=args.dtype), loaded)
    native.save_native(args.target, opened.config, params, opened.origin())
    print(f"wrote {args.target}: {args.source} with {', '.join(args.adapter)}; {LICENCES}")


def _prune(args: argparse.Namespace) -> None:
    from blip3o_jax.convert.prune import prune

    depth = prune(args.source, args.target, args.blocks).dit.depth
    print(f"wrote {args.target}: {args.source} with {depth} blocks; {LICENCES}")


def _random(args: argparse.Namespace) -> None:
    from blip3o_jax.config.presets import preset
    from blip3o_jax.convert.random_weights import random_checkpoint

    size = random_checkpoint(preset(args.preset), args.target, args.seed, args.dtype, int(args.shard_gb * 1e9))
    print(f"wrote {args.target}: {size:,} random weights of the geometry {args.preset}")


def report(plan, info: Mapping) -> str:
    """Formats a table of tensors by part, and of unused tensors by reason."""
    parts = collections.defaultdict(list)
    for leaf in plan.leaves:
        parts[leaf.path.split("/")[0]] += leaf.keys
    used = [key for keys in parts.values() for key in keys]
    lines = [f"{'part':<18}{'tensors':>8}{'parameters':>16}  types"]
    for name, keys in [*parts.items(), ("all", used)]:
        kinds = ", ".join(sorted({str(info[key].dtype) for key in keys}))
        lines.append(f"{name:<18}{len(keys):>8}{sum(info[key].size for key in keys):>16,}  {kinds}")
    for reason, count in sorted(collections.Counter(plan.unused.values()).items()):
        size = sum(info[key].size for key, why in plan.unused.items() if why == reason)
        lines.append(f"kept aside: {count} tensors, {size:,} elements: {reason}")
    lines += [f"duplicate of {original}: {key}" for key, original in plan.aliases.items()]
    count = len(used) + len(plan.unused) + len(plan.aliases)
    lines.append(f"every leaf filled once; {count} of {len(info)} tensors accounted for")
    return "\n".join(lines)
