#!/usr/bin/env bash
# Rows that are copied one by one into a larger array do not compile for a TPU where that happens within another loop: fori_loop
# over rows, each a dynamic_slice of one array written by dynamic_update_slice into the carry, within fori_loop or while_loop.
# So a decoding loop that writes each row of a cache at its own position. The compiler stops with "INTERNAL: RET_CHECK
# failure ... The shape doesn't match when replacing" and the type of the copied array, which names no line of the program.
# The same program compiles for a CPU and is right; for a TPU, too, without the outer loop. Sizes, dtype, donation, and whether
# positions are known when it is compiled do not matter. Rows of ones compile: it takes both slices in the inner loop.
# Right are lax.scan over the rows in place of the inner loop, which makes the same loop and compiles, the inner loop with
# unroll=True, or one write of all rows, vmap of row.at[start + jnp.arange(size)].set(values).
# Seen with libtpu 0.0.42.1 for v5e, compiled without a device. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'libtpu==0.0.42.1' 2>/dev/null
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-4 TPU_WORKER_HOSTNAMES=localhost
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import importlib.metadata
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

place = SingleDeviceSharding(topologies.get_topology_desc("v5e:2x2", "tpu").devices[0])
ROWS, SLOTS, SIZE, WIDTH = 4, 32, 4, 8


def rows_in_loop(array, values, start, unroll=1):
    def write(row, array):
        return lax.dynamic_update_slice(array, lax.dynamic_slice_in_dim(values, row, 1), (row, start[row], 0))

    return lax.fori_loop(0, ROWS, write, array, unroll=unroll)


def rows_in_scan(array, values, start):
    def write(array, row):
        number, value, begin = row
        return lax.dynamic_update_slice(array, value[None], (number, begin, 0)), None

    return lax.scan(write, array, (jnp.arange(ROWS), values, start))[0]


def all_rows(array, values, start):
    return jax.vmap(lambda row, value, begin: row.at[begin + jnp.arange(SIZE)].set(value))(array, values, start)


def steps(write):
    def program(array, values, start):
        return lax.fori_loop(0, 3, lambda step, array: write(array, values, start + step), array)

    return program


shapes = ((ROWS, SLOTS, WIDTH), jnp.float32), ((ROWS, SIZE, WIDTH), jnp.float32), ((ROWS,), jnp.int32)
rng = np.random.default_rng(0)
inputs = rng.normal(size=shapes[0][0]).astype("f"), rng.normal(size=shapes[1][0]).astype("f"), np.array([0, 3, 9, 1], "i")


def compiles(name, program):
    """Whether it compiles for a TPU, with the result of the same program on CPU beside it."""
    places = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]
    said = "compiles"
    try:
        jax.jit(program).lower(*places).compile()
    except jax.errors.JaxRuntimeError as error:
        said = str(error).split(" (")[0]
    print(f"{name}: {said}; on CPU the sum is {float(jax.jit(program)(*inputs).sum()):.4f}")
    return said == "compiles"


print("jax", jax.__version__, "libtpu", importlib.metadata.version("libtpu"))
found = [
    compiles("rows in a loop, once", rows_in_loop),
    compiles("rows in a loop, within a loop", steps(rows_in_loop)),
    compiles("rows in a scan, within a loop", steps(rows_in_scan)),
    compiles("rows in an unrolled loop, within a loop", steps(lambda *x: rows_in_loop(*x, unroll=True))),
    compiles("all rows at once, within a loop", steps(all_rows)),
]
sys.exit(0 if found == [True, False, True, True, True] else 1)
PYTHON
