#!/usr/bin/env bash
# jnp.histogram counts in the dtype of the data: no bin of a bfloat16 array holds more than 256, none of a float16 array
# more than 2048, none of a float32 array more than 16,777,216. The histogram of 30,000 normal numbers in bfloat16 is
# flat (29, 256, 256, 256, 256, 256, 256, 45), although the bin edges are right, and density=True normalises it to a
# plausible uniform density. It concerns every log of the distribution of weights, activations or gradients, in float32
# those of an embedding table of more than 16.8 million entries.
# The documentation says "counts per bin" and "JAX implementation of numpy.histogram", whose counts are int64. Counts
# arise by adding the weight 1 of the data's dtype one by one, so that 256 + 1 = 256. Nothing is raised or logged.
# jnp.mean and jnp.sum of the same array accumulate in float32 and are right; so is jnp.bincount, which counts in int32.
# Casting to float32 first is right up to 16,777,216 per bin; integer weights are cast to float32 as well. Any size is
# right with jnp.bincount(jnp.digitize(x, edges[1:-1]), length=edges.size - 1).
# Seen alike with jax 0.8.3 and 0.10.2, with and without jit. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 2>/dev/null
cat >"$folder/histogram.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__, "numpy", np.__version__)
normal = jax.random.normal(jax.random.key(0), (30_000,)).astype(jnp.bfloat16)
counts, edges = jnp.histogram(normal, bins=8)
right = np.histogram(np.asarray(normal, np.float64), np.asarray(edges, np.float64))[0]
density = np.asarray(jnp.histogram(normal, bins=8, density=True)[0], np.float64)
print(f"normal bfloat16: {np.asarray(counts, int).tolist()}, numpy on the same edges {right.tolist()}")
print(f"density=True: {density.round(3).tolist()}")
most = {}
for dtype, size in {"bfloat16": 1000, "float16": 10_000, "float32": 20_000_000}.items():
    zeros = jnp.zeros(size, dtype)
    most[dtype] = [int(find(zeros)) for find in (lambda x: jnp.histogram(x, 2)[0].max(), lambda x: jnp.sum(x == 0))]
    print(f"{size:,} zeros in {dtype}: largest count {most[dtype][0]:,}, sum of (x == 0) {most[dtype][1]:,}")
cast = jnp.histogram(normal.astype(jnp.float32), edges.astype(jnp.float32))[0]
inner = jnp.array([-1.0, 1.0])
integers = jnp.bincount(jnp.digitize(jnp.zeros(20_000_000), inner), length=3)
print(f"cast to float32: {np.asarray(cast, int).tolist()}; 20,000,000 zeros by bincount: {int(integers.max()):,}")
as_found = int(counts.max()) == 256 and right.max() > 10_000 and density[1:7].max() / density[1:7].min() < 1.05
as_found &= most == {"bfloat16": [256, 1000], "float16": [2048, 10_000], "float32": [2**24, 20_000_000]}
sys.exit(0 if as_found and np.array_equal(cast, right) and int(integers.max()) == 20_000_000 else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/histogram.py"
