#!/usr/bin/env bash
# flax.linen.Embed(dtype=bfloat16) with float32 parameters, the usual mixed precision: the gradient of a token that
# occurs 4096 times in a batch is an eighth of the right one, of one that occurs 1000 times a half. Embed casts the
# table to bfloat16 and then takes rows, so that the gradient is added up in bfloat16, one occurrence after the other,
# and cast to float32 afterwards; a sum of 512 does not change by adding 1. nnx.Embed does the same. Frequent tokens
# (separators, padding, image placeholders) learn too slowly, while the loss is right and the parameters, the gradients
# and the optimizer's state are all float32, so that nothing shows it.
# The documentation of "dtype" says "the dtype of the embedding vectors". The gradient of a Dense layer's bias, also a
# sum over the batch, is right on CPU. Taking rows of the float32 table and casting them, jnp.take(table, ids,
# axis=0).astype(bfloat16), gives bit for bit the same output and the right gradient.
# Measured on CPU with flax 0.12.8 (jax 0.10.2) and 0.12.6 (jax 0.8.3). The program that XLA compiles for an H100, here
# without a GPU, has the same bfloat16 scatter and adds with atom.add.bf16. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'flax==0.12.8' 2>/dev/null
"$folder/venv/bin/pip" install --quiet --no-deps 'jax-cuda12-plugin==0.10.2' 'jax-cuda12-pjrt==0.10.2' 2>/dev/null
cat >"$folder/embed.py" <<'PYTHON'
import pathlib
import re
import sys

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

GPU = """gpu_device_info { cuda_compute_capability { major: 9 minor: 0 }
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 memory_bandwidth: 3352000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 85899345920 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 9 }"""
TIMES = {1: 4096, 2: 1000, 3: 200, 4: 1}  # occurrences of each token id
ids = jnp.array(np.random.default_rng(0).permutation(np.repeat(list(TIMES), list(TIMES.values()))))
weights = jax.random.uniform(jax.random.key(1), (ids.size, 8), minval=0.5, maxval=1.5)  # slope of the loss
embed = nn.Embed(5, 8, dtype=jnp.bfloat16)
table = embed.init(jax.random.key(0), ids)["params"]["embedding"]
FORMS = {
    "nn.Embed, dtype bfloat16": lambda table, ids: embed.apply({"params": {"embedding": table}}, ids),
    "nn.Embed, dtype float32": lambda table, ids: nn.Embed(5, 8).apply({"params": {"embedding": table}}, ids),
    "rows taken, then cast": lambda table, ids: jnp.take(table, ids, axis=0).astype(jnp.bfloat16),
}
right = jnp.stack([weights[ids == token].sum(axis=0) for token in range(5)])


def loss(table, form, ids, weights):
    return (form(table, ids).astype(jnp.float32) * weights).sum()


print(f"jax {jax.__version__}, flax {flax.__version__}; parameters {table.dtype}; tokens occur {TIMES}")
shares = {}
for name, form in FORMS.items():
    found = jax.jit(jax.grad(loss), static_argnums=1)(table, form, ids, weights)
    shares[name] = np.asarray((found[1:] / right[1:]).mean(axis=1))
    rounded = [round(float(share), 3) for share in shares[name]]
    print(f"{name}: gradient in {found.dtype} / exact one, by token: {rounded}")
same = bool((FORMS["nn.Embed, dtype bfloat16"](table, ids) == FORMS["rows taken, then cast"](table, ids)).all())
print(f"outputs of the two bfloat16 forms are equal: {same}")
module = nnx.Embed(5, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
slopes = nnx.grad(lambda module: (module(ids).astype(jnp.float32) * weights).sum())(module)
slopes = slopes["embedding"][...]
shares["nnx"] = np.asarray((slopes[1:] / right[1:]).mean(axis=1))
print(f"nnx.Embed, dtype bfloat16: {slopes.dtype}, {[round(float(share), 3) for share in shares['nnx']]}")

# the training step of a real vocabulary, compiled for an H100
place = SingleDeviceSharding(
    topologies.get_topology_desc("h100", "cuda", target_config=GPU, topology="1x1x1").devices[0]
)
shapes = [((151936, 1024), jnp.float32), ((16, 4096), jnp.int32), ((16, 4096, 1024), jnp.float32)]
large = nn.Embed(151936, 1024, dtype=jnp.bfloat16)


def step(table, ids, weights):
    return jax.grad(lambda table: (large.apply({"params": {"embedding": table}}, ids) * weights).sum())(table)


arguments = [jax.ShapeDtypeStruct(*shape, sharding=place) for shape in shapes]
program = jax.jit(step).lower(*arguments).compile().as_text()
scatter = re.search(r"= (\S+?)\{\S* scatter\(", program)[1]
kernels = "".join(path.read_text() for path in pathlib.Path(sys.argv[1]).glob("*.ptx"))
adds = sorted(set(re.findall(r"atom\S*add\S*bf16", kernels)))
print(f"H100: scatter of {scatter}, {adds}")
as_found = all(shares[name][0] < 0.2 and shares[name][3] > 0.98 for name in ("nn.Embed, dtype bfloat16", "nnx"))
as_found &= all(abs(shares[name] - 1).max() < 0.01 for name in list(FORMS)[1:])
sys.exit(0 if as_found and same and scatter.startswith("bf16") and adds else 1)
PYTHON
export JAX_PLATFORMS=cpu XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_dump_to=$folder/dump"
"$folder/venv/bin/python" "$folder/embed.py" "$folder/dump" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
