#!/usr/bin/env bash
# jax.random.categorical on bfloat16 logits: of 1000 equal logits, 278 indices never come up in 20,000 draws, and the
# mean of the drawn indices is 127 instead of 499.5. The Gumbel noise is drawn in the dtype of the logits, from a
# uniform variable with 128 values, so that most maxima are ties, and argmax takes the first. jax.random.bernoulli
# with a probability of 0.001 in bfloat16 is true 8 times as often, for the same reason. float16 is biased too, by
# less.
# The logits (all 0) are exact in bfloat16: rounding of the input is not the cause. The documentation names a limit
# for float32 only, probabilities below 1e-7, and the argument "mode" for it. Nothing is raised or logged.
# categorical(key, logits.astype(float32)) is right. Seen alike with jax 0.8.3, 0.10.2 and 0.12.0.1.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 2>/dev/null
cat >"$folder/draw.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpy as np

key = jax.random.key(0)
print("jax", jax.__version__)
means, never, share = {}, {}, {}
for dtype in "float32", "float16", "bfloat16":
    indices = np.asarray(jax.random.categorical(key, jnp.zeros(1000, dtype), shape=(20_000,)))
    means[dtype], never[dtype] = indices.mean(), 1000 - len(np.unique(indices))
    share[dtype] = float(jax.random.bernoulli(key, jnp.asarray(0.001, dtype), (1_000_000,)).mean())
    found = f"mean index {means[dtype]:.1f} (499.5 expected), {never[dtype]} of 1000 indices never drawn"
    print(f"{dtype}: {found}; bernoulli(0.001) is true in {share[dtype]:.5f}")
cast = jnp.zeros(1000, "bfloat16").astype("float32")
right = float(jax.random.categorical(key, cast, shape=(20_000,)).mean())
print(f"bfloat16 logits, cast to float32 for the draw: mean index {right:.1f}")
as_found = means["bfloat16"] < 200 and never["bfloat16"] > 200 and share["bfloat16"] > 0.005
as_found &= means["float16"] < 450 and abs(means["float32"] - 499.5) < 10 and abs(right - 499.5) < 10
sys.exit(0 if as_found and abs(share["float32"] - 0.001) < 2e-4 else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/draw.py"
