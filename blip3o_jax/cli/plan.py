"""`python -m blip3o_jax.plan --config=configs/NAME.py[:STAGE] --target v5e:4x8 [--config.key=value ...]`.

`python -m blip3o_jax.plan --sample t2i --batch_size 8 --target v5e` plans sampling with the model of a preset.

Compiles the training step and reinforcement-learning rollouts for a target machine: a TPU topology (v4, v5e, v5p, v6e),
or h100:N, h200:N, a100-80gb:N. Needs no device, data or weights: their paths may be unset. Without --target the
programs are compiled for simulated CPU devices, which gives an estimate. Prints memory per device, kernels,
communication and the largest arrays. Exits with 0 if the run fits into memory; otherwise it compiles changes to find
one that fits, and exits with 1.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
from typing import Any

from blip3o_jax.cli import configuration
from blip3o_jax.command_line import Parser, of
from blip3o_jax.config.schema import Count
from blip3o_jax.errors import UserError, reported, require

PRESET = "blip3o-next-3b"
UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}


def parser() -> Parser:
    flags = Parser(prog="python -m blip3o_jax.plan", description=__doc__)
    add = flags.add_argument
    add("--config", help=configuration.HELP)
    add("--sample", metavar="TASK", help="plan sampling instead of a configuration: t2i, edit or reconstruct")
    add("--preset", help=f"geometry for --sample; default: {PRESET}")
    add("--batch_size", type=of(Count), help="images per batch for --sample; default: 1")
    add("--dtype", help="weights for --sample: float32, bfloat16 or int8; default: bfloat16")
    add("--target", help="machine to compile for, such as v5e:4x8, v5p:4x4x2 or h200:8")
    add("--num_devices", type=of(Count), help="simulated CPU devices; default: the product of the mesh sizes")
    add("--mesh", help="mesh sizes such as data:4,fsdp:8,tensor:1; default: the configuration's")
    add("--rows_per_device", type=of(Count), help="batch rows per device, instead of data.batch_size")
    add("--device_memory", help=f"memory per device, with unit {', '.join(UNITS)}; default: the target's, else 80GB")
    add("--devices_per_host", type=of(Count), help="devices per host, for host memory; default: 4 for a TPU, else 8")
    add("--suggest", action=argparse.BooleanOptionalAction, default=True, help="try changes if the run does not fit")
    add("--json", action="store_true", help="print one JSON object")
    return flags


def main(arguments: list[str] | None = None) -> None:
    """Parses, sets up the devices, then imports jax and plans."""
    args = configuration.parse(parser(), arguments)
    with reported(args.debug):
        require(
            (args.config is None) != (args.sample is None),
            "plan",
            "both --config and --sample" if args.sample else "neither --config nor --sample",
            "one of them",
            "say what to plan",
        )
        refuse_without_effect(args)
        if args.sample is not None:
            sys.exit(_plan_sampling(args))
        settings = configuration.read(args.config, args.changes)
        if args.mesh is not None:
            settings["mesh"] = parse_mesh(args.mesh)
        target = _target(args, settings.get("mesh") or {})
        from blip3o_jax.plan import report, step, suggest

        plan, found = step.plan(settings, target.devices, args.rows_per_device, _say), None
        fits = report.fits(plan, target)
        if not args.json:
            hosted = args.devices_per_host or (4 if target.platform == "tpu" else 8)
            print(report.text(plan, target, hosted))
        if not fits and args.suggest:
            found = suggest.fitting(settings, target, args.rows_per_device, _say)
        if args.json:
            print(json.dumps(report.as_dict(plan, target) | {"fits_with": found and found[0]}))
        elif found is not None:
            print(f"fits with {found[0]}: {found[1].total:,} bytes")
        elif not fits and args.suggest:
            print("none of the changes tried makes it fit: use more devices or fewer rows")
    sys.exit(0 if fits else 1)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def refuse_without_effect(args: argparse.Namespace) -> None:
    """Raises UserError for an option that only the other kind of plan has."""
    other, names = ("--sample", ("preset", "batch_size", "dtype"))
    if args.sample is not None:
        other, names = "--config", ("mesh", "rows_per_device", "devices_per_host")
        require(not args.changes, f"--config.{''.join(args.changes[:1])}", "--sample", "--config", "leave one out")
    for name in names:
        require(getattr(args, name) is None, f"--{name}", getattr(args, name), f"{other} beside it", "leave it out")


def _plan_sampling(args: argparse.Namespace) -> int:
    """Prints the plan of sampling; returns the exit code."""
    target = _target(args, {})
    from blip3o_jax.config.presets import preset
    from blip3o_jax.plan import report
    from blip3o_jax.plan.sampling import plan_sampling

    options = {"task": args.sample, "rows": args.batch_size or 1, "dtype": args.dtype or "bfloat16"}
    plan = plan_sampling(preset(args.preset or PRESET), target.devices, say=_say, **options)
    print(json.dumps(report.as_dict(plan, target)) if args.json else report.sampling_text(plan, target))
    return 0 if report.fits(plan, target) else 1


def _target(args: argparse.Namespace, mesh: dict[str, int]) -> Any:
    """Returns the target machine. Sets environment variables, so jax must not be imported before."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    memory = None if args.device_memory is None else parse_bytes(args.device_memory)
    count = args.num_devices or (math.prod(mesh.values()) if mesh and -1 not in mesh.values() else 0)
    if args.target is not None:
        expected = f"the number of --target {args.target}"
        require(args.num_devices is None, "--num_devices", args.num_devices, expected, "leave it out")
    else:
        expected = "--target, or the number of simulated CPU devices"
        require(count >= 1, "--target", "none", expected, "add such as --target=v5e:4x8 or --num_devices=8")
        simulated = f"--xla_force_host_platform_device_count={count}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {simulated}".strip()
    from blip3o_jax.plan import targets

    target = targets.open_target(args.target) if args.target is not None else targets.simulated(count, 80 * 10**9)
    return target if memory is None else dataclasses.replace(target, memory_bytes=memory)


def parse_mesh(text: str) -> dict[str, int]:
    """Parses mesh sizes such as `data:4,fsdp:8`; raises UserError for other text."""
    try:
        pairs = [(axis, int(size)) for axis, size in (part.split(":") for part in text.split(","))]
    except ValueError:
        pairs = []
    if not pairs or len(dict(pairs)) < len(pairs) or any(size < 1 and size != -1 for _, size in pairs):
        raise UserError("--mesh", got=f"{text!r}", expected="AXIS:SIZE,...", do="such as data:4,fsdp:8,tensor:1")
    return dict(pairs)


def parse_bytes(text: str) -> int:
    """Parses a size such as `80GB`; raises UserError for other text."""
    unit = next((unit for unit in UNITS if text.endswith(unit)), None)
    try:
        size = float(text.removesuffix(unit or "?")) * UNITS[unit]
    except (ValueError, KeyError):
        size = math.nan
    require(0 < size < math.inf, "--device_memory", f"{text!r}", "such as 80GB", f"units are {', '.join(UNITS)}")
    return int(size)
