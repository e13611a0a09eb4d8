#!/usr/bin/env bash
# Compiled.memory_analysis().peak_memory_in_bytes: of a program compiled for CPU it leaves the temporaries out, which live in
# one arena of temp_size_in_bytes; it is arguments and results alone. Of the same program compiled for a TPU it has all.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'libtpu==0.0.42.1'
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-4 TPU_WORKER_HOSTNAMES=localhost
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import importlib.metadata
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding


def program(x):
    sorted_rows, sorted_columns = jnp.sort(x, axis=1), jnp.sort(x, axis=0)
    return jnp.dot(sorted_rows, sorted_columns).sum()


def report(name, device):
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.float32, sharding=SingleDeviceSharding(device))
    found = jax.jit(program).lower(x).compile().memory_analysis()
    sizes = found.argument_size_in_bytes, found.temp_size_in_bytes, found.peak_memory_in_bytes
    print(f"{name}: arguments {sizes[0]:,}, temporaries {sizes[1]:,}, peak {sizes[2]:,} bytes")
    return sizes


print("jax", jax.__version__, "libtpu", importlib.metadata.version("libtpu"))
cpu = report("cpu", jax.devices()[0])
tpu = report("TPU v5e", topologies.get_topology_desc("v5e:2x2", "tpu").devices[0])
as_found = cpu[1] > 10**8 and cpu[2] - cpu[0] < 1000 and tpu[2] - tpu[0] > 10**8
sys.exit(0 if as_found else 1)
PYTHON
