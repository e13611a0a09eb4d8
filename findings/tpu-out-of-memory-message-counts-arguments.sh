#!/usr/bin/env bash
# A program that does not fit a TPU is refused with "the total memory required for HLO temporaries (20.00G) exceeds available
# HBM (15.75G)". The figure is not that of temporaries: arguments and results are in it, in GiB. A sum of a 20 GiB argument,
# which has no temporaries, is refused with 20.00G; x + 1 of 10 GiB, too, and with x donated it compiles. Adding the size of
# the weights to it counts them twice. An argument of 20 GiB that the program does not use is dropped, and it compiles.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'libtpu==0.0.42.1' 2>/dev/null
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-4 TPU_WORKER_HOSTNAMES=localhost
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import importlib.metadata
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

place = SingleDeviceSharding(topologies.get_topology_desc("v5e:2x2", "tpu").devices[0])


def outcome(name, program, *sizes, **options):
    """GiB that the compiler says a refused program needs for temporaries; 0 if it compiles."""
    shapes = [jax.ShapeDtypeStruct((gib, 256, 1024, 1024), jnp.float32, sharding=place) for gib in sizes]
    try:
        memory = jax.jit(program, **options).lower(*shapes).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        said = re.search(r"HLO temporaries \(([\d.]+)G\)", str(error))[1]
        print(f"{name}: refused, HLO temporaries ({said}G)")
        return float(said)
    sizes = memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.peak_memory_in_bytes
    print(f"{name}: compiles, arguments {sizes[0]:,}, temporaries {sizes[1]:,}, peak {sizes[2]:,} bytes")
    return 0


print("jax", jax.__version__, "libtpu", importlib.metadata.version("libtpu"))
seen = [
    outcome("sum of 12 GiB", lambda x: x.sum(), 12),
    outcome("sum of 20 GiB", lambda x: x.sum(), 20),
    outcome("10 GiB + 1", lambda x: x + 1, 10),
    outcome("10 GiB + 1, donated", lambda x: x + 1, 10, donate_argnums=0),
    outcome("1 GiB + 1, 20 GiB unused", lambda x, y: x + 1, 1, 20),
]
sys.exit(0 if seen == [0, 20, 20, 0, 0] else 1)
PYTHON
