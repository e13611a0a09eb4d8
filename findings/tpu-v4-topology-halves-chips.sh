#!/usr/bin/env bash
# jax.experimental.topologies, TPU v4: "v4:2x2x1" describes four chips, and by default its description has eight devices, two per
# chip, which jax.make_mesh then refuses ("megacore"). v5p has the same dual-core chips and gives one device per chip.
# chip_config_name="megacore" gives the four devices that a v4 host shows.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'libtpu==0.0.42.1'
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v4-8 TPU_WORKER_HOSTNAMES=localhost
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import importlib.metadata
import sys

import jax
from jax.experimental import topologies
from jax.sharding import AxisType


def describe(name, **options):
    devices = topologies.get_topology_desc(name, "tpu", **options).devices
    try:
        jax.make_mesh((len(devices),), ("x",), (AxisType.Auto,), devices=devices)
        mesh = "a mesh can be made"
    except Exception as error:
        mesh = f"make_mesh: {type(error).__name__}: {str(error)[:90]}"
    print(f"{name} {options or ''}: {len(devices)} devices of kind {devices[0].device_kind}; {mesh}")
    return len(devices), mesh


print("jax", jax.__version__, "libtpu", importlib.metadata.version("libtpu"))
default = describe("v4:2x2x1")
megacore = describe("v4:2x2x1", chip_config_name="megacore")
newer = describe("v5p:2x2x1")
as_found = (default[0], megacore[0], newer[0]) == (8, 4, 4) and "megacore" in default[1] and "can be made" in newer[1]
sys.exit(0 if as_found else 1)
PYTHON
