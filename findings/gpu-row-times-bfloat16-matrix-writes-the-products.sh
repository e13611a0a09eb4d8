#!/usr/bin/env bash
# XLA for an H100 turns a product of one bfloat16 row with a matrix, x[1, K] @ w[K, F], into an elementwise product and a
# sum over K. If F is small (2048 here) it does not fuse them: all K x F products are rounded to bfloat16, written to memory
# and read again, so the temporaries are as large as the weights and the memory traffic is three times theirs. A decoder at
# batch 1 meets this in every layer. With preferred_element_type=float32 and a cast of the result it is one kernel without
# temporaries; so it is with the matrix stored as [F, K], in float32, or for an A100.
# Compiled with jax's CUDA plugin without a GPU; nothing is run. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2'
"$folder/venv/bin/pip" install --quiet --no-deps 'jax-cuda12-plugin==0.10.2' 'jax-cuda12-pjrt==0.10.2'
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_gpu_autotune_level=0
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

CONFIG = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: 0 }}
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  core_count: {cores} fpus_per_core: {units}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared} shared_memory_per_core: {shared_core}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock} device_memory_size: 85899345920
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{name}"
"""
H100 = dict(major=9, cores=132, units=128, shared=232448, shared_core=233472, bandwidth=3352 * 10**9, cache=50 * 2**20,
            clock=1.98, name="NVIDIA H100 80GB HBM3")
A100 = dict(major=8, cores=108, units=64, shared=166912, shared_core=167936, bandwidth=2039 * 10**9, cache=40 * 2**20,
            clock=1.41, name="NVIDIA A100-SXM4-80GB")


def found(name, program, gpu=H100, dtype=jnp.bfloat16, columns=2048):
    """Whether an array of all products is made."""
    options = {"target_config": CONFIG.format(**gpu), "topology": "1x1x1"}
    place = SingleDeviceSharding(topologies.get_topology_desc("gpu", "cuda", **options).devices[0])
    shapes = [jax.ShapeDtypeStruct(size, dtype, sharding=place) for size in ((1, 2048), (2048, columns))]
    compiled = jax.jit(program).lower(*shapes).compile()
    entry = compiled.as_text().partition("\nENTRY ")[2]
    kernels = re.findall(r" = (\w+\[[\d,]*\])\S* (?:fusion|custom-call)\(", entry)
    matrix, temporaries = shapes[1].size * shapes[1].dtype.itemsize, compiled.memory_analysis().temp_size_in_bytes
    print(f"{name:<42} matrix {matrix:>10,} B, temporaries {temporaries:>9,} B, kernels make {', '.join(kernels)}")
    return temporaries == matrix and f"bf16[2048,{columns}]" in kernels


print("jax", jax.__version__)
written = [
    found("bfloat16 x @ w", lambda x, w: x @ w),
    found("bfloat16 x @ w, 1024 columns", lambda x, w: x @ w, columns=1024),
]
not_written = [
    found("bfloat16 x @ w, 4096 columns", lambda x, w: x @ w, columns=4096),
    found("preferred float32, cast to bfloat16",
          lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)),
    found("bfloat16 x @ w.T", lambda x, w: x @ w.T),
    found("float32 x @ w", lambda x, w: x @ w, dtype=jnp.float32),
    found("bfloat16 x @ w on an A100", lambda x, w: x @ w, gpu=A100),
]
sys.exit(0 if all(written) and not any(not_written) else 1)
PYTHON
