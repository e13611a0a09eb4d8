"""`python -m blip3o_jax.plan --config=configs/NAME.py[:STAGE] --num_devices N [--config.key=value ...]`.

Compiles the training step ahead of time for N simulated devices, from shapes alone, and prints what a device has to
hold. Neither data nor weights are needed: their paths may be unset. Exit code 0 if the step fits, 1 if it does not.
"""

import json
import math
import os
import sys

from blip3o_jax.cli import configuration
from blip3o_jax.command_line import Parser, of
from blip3o_jax.config.schema import Count
from blip3o_jax.errors import UserError, reported

UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}
MAX_DEVICES = 2**16


def parser() -> Parser:
    """The command line."""
    flags = Parser(prog="python -m blip3o_jax.plan", description=__doc__)
    add = flags.add_argument
    add("--config", required=True, help=configuration.HELP)
    add("--num_devices", type=of(Count), help="devices of the run; default: the product of the mesh's sizes")
    add("--mesh", help="sizes such as data:4,fsdp:8,tensor:1, in place of the configuration's")
    add("--rows_per_device", type=of(Count), help="rows of the batch per device, in place of data.batch_size")
    add("--device_memory", default="80GB", help=f"memory of a device, a number with {', '.join(UNITS)}")
    add("--devices_per_host", type=of(Count), default=8, help="devices of one host, for its memory")
    add("--json", action="store_true", help="print one JSON object")
    return flags


def main(arguments: list[str] | None = None) -> None:
    """Sets up the simulated devices, then plans; jax is imported in between."""
    args = configuration.parse(parser(), arguments)
    with reported(args.debug):
        settings = configuration.read(args.config, args.changes)
        memory = parse_bytes(args.device_memory)
        if args.mesh is not None:
            settings["mesh"] = parse_mesh(args.mesh)
        count = number_of_devices(args.num_devices, settings.get("mesh") or {})
        os.environ["JAX_PLATFORMS"] = "cpu"
        simulated = f"--xla_force_host_platform_device_count={count}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {simulated}".strip()
        from blip3o_jax.plan import report, step  # jax reads the environment when it is imported

        plan = step.plan(settings, count, args.rows_per_device)
        print(
            json.dumps(report.as_dict(plan, memory)) if args.json else report.text(plan, memory, args.devices_per_host)
        )
    sys.exit(0 if plan.total <= memory else 1)


def parse_mesh(text: str) -> dict[str, int]:
    """`data:4,fsdp:8` as a dictionary.

    Raises:
      UserError: it is something else.
    """
    try:
        pairs = [(axis, int(size)) for axis, size in (part.split(":") for part in text.split(","))]
    except ValueError:
        pairs = []
    if not pairs or len(dict(pairs)) < len(pairs) or any(size < 1 and size != -1 for _, size in pairs):
        raise UserError("--mesh", got=f"{text!r}", expected="AXIS:SIZE,...", do="such as data:4,fsdp:8,tensor:1")
    return dict(pairs)


def parse_bytes(text: str) -> int:
    """`80GB` as a number.

    Raises:
      UserError: it is something else.
    """
    unit = next((unit for unit in UNITS if text.endswith(unit)), None)
    try:
        size = float(text.removesuffix(unit or "?")) * UNITS[unit]
    except (ValueError, KeyError):
        size = math.nan
    if not 0 < size < math.inf:
        raise UserError("--device_memory", got=f"{text!r}", expected="such as 80GB", do=f"units are {', '.join(UNITS)}")
    return int(size)


def number_of_devices(given: int | None, mesh: dict[str, int]) -> int:
    """Devices to simulate.

    Raises:
      UserError: neither given nor told by the mesh.
    """
    count = given
    if count is None and mesh and -1 not in mesh.values():
        count = 1
        for size in mesh.values():
            count *= size
    if count is None or count < 1:
        raise UserError(
            "--num_devices",
            got=f"{given} and a mesh {mesh}",
            expected="1 or more",
            do="give it, or all sizes of the mesh",
        )
    return count
