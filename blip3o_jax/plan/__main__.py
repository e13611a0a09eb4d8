"""`python -m blip3o_jax.plan --config=configs/NAME.py[:STAGE] --num_devices N [--config.key=value ...]`.

Compiles the training step ahead of time for N simulated devices, from shapes alone, and prints what a device has to
hold. Neither data nor weights are needed: their paths may be unset. Exit code 0 if the step fits, 1 if it does not.
"""

import json
import os
import sys

from absl import app, flags

from blip3o_jax.errors import UserError, reported
from blip3o_jax.flags import define_config, parse

UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}

CONFIG = define_config()
DEVICES = flags.DEFINE_integer("num_devices", None, "devices of the run; default: the product of the mesh's sizes")
MESH = flags.DEFINE_string("mesh", None, "sizes such as data:4,fsdp:8,tensor:1, in place of the configuration's")
ROWS = flags.DEFINE_integer("rows_per_device", None, "rows of the batch per device, in place of data.batch_size")
MEMORY = flags.DEFINE_string("device_memory", "80GB", f"memory of a device, a number with {', '.join(UNITS)}")
PER_HOST = flags.DEFINE_integer("devices_per_host", 8, "devices of one host, for its memory", lower_bound=1)
AS_JSON = flags.DEFINE_bool("json", False, "print one JSON object")
DEBUG = flags.DEFINE_bool("debug", False, "show tracebacks")


def main(arguments: list[str]) -> None:
    """Sets up the simulated devices, then plans; jax is imported in between."""
    with reported(DEBUG.value):
        if len(arguments) > 1:
            raise UserError("arguments", got=arguments[1], expected="flags only", do="write --name=value")
        if CONFIG.value is None:
            raise UserError("--config: missing", expected="it on the command line", do="see --help")
        settings = CONFIG.value.to_dict()
        memory = parse_bytes(MEMORY.value)
        if MESH.value is not None:
            settings["mesh"] = parse_mesh(MESH.value)
        count = number_of_devices(DEVICES.value, settings.get("mesh", {}))
        os.environ["JAX_PLATFORMS"] = "cpu"
        simulated = f"--xla_force_host_platform_device_count={count}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {simulated}".strip()
        from blip3o_jax.plan import report, step  # jax reads the environment when it is imported

        plan = step.plan(settings, count, ROWS.value)
        print(json.dumps(report.as_dict(plan, memory)) if AS_JSON.value else report.text(plan, memory, PER_HOST.value))
    sys.exit(0 if plan.total <= memory else 1)


def parse_mesh(text: str) -> dict[str, int]:
    """`data:4,fsdp:8` as a dictionary.

    Raises:
      UserError: it is something else.
    """
    try:
        return {axis: int(size) for axis, size in (part.split(":") for part in text.split(","))}
    except ValueError:
        raise UserError(
            "--mesh", got=f"{text!r}", expected="axis:size,...", do="such as data:4,fsdp:8,tensor:1"
        ) from None


def parse_bytes(text: str) -> int:
    """`80GB` as a number.

    Raises:
      UserError: it is something else.
    """
    unit = next((unit for unit in UNITS if text.endswith(unit)), None)
    try:
        return int(float(text.removesuffix(unit or "?")) * UNITS[unit])
    except (ValueError, KeyError):
        raise UserError(
            "--device_memory", got=f"{text!r}", expected="such as 80GB", do=f"units are {', '.join(UNITS)}"
        ) from None


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


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
