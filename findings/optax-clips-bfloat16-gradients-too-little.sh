#!/usr/bin/env bash
# optax.clip_by_global_norm on bfloat16 gradients: clipped to 1, their norm is still 1.98. Optax adds the squared
# norms of the leaves in bfloat16, one after the other: 1 + 1 + ... stops at 256, and after one large leaf the small
# ones do not count. A model with hundreds of leaves trains with gradients longer than the limit, and
# optax.global_norm reports the same small number, so that no log shows it.
# No dtype is named in the documentation, and torch.nn.utils.clip_grad_norm_ is right on the same bfloat16 gradients.
# Casting the gradients to float32 before the transformation is right. Seen alike with optax 0.2.6 (jax 0.8.3) and
# 0.2.8 (jax 0.10.2 and 0.12.0.1), with and without jit.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'optax==0.2.8' 2>/dev/null
cat >"$folder/clip.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

SIZES = {"1000 equal leaves": [1.0] * 1000, "one large leaf, then 300 small ones": [32.0, *[2.0] * 300]}


def norm(gradients):
    return float(np.sqrt(sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in gradients)))


clip = optax.clip_by_global_norm(1.0)
print("jax", jax.__version__, "optax", optax.__version__)
after = {}
for name, values in SIZES.items():
    for dtype in "float32", "bfloat16":
        gradients = [jnp.full((1,), value, dtype) for value in values]  # exact in both
        clipped, _ = clip.update(gradients, clip.init(gradients))
        after[name, dtype] = norm(clipped)
        reported = float(optax.global_norm(gradients))
        norms = f"norm {norm(gradients):.2f}, global_norm {reported:.2f}, after clipping to 1: {after[name, dtype]:.3f}"
        print(f"{name}, {dtype}: {norms}")
as_found = all(after[name, "bfloat16"] > 1.4 and abs(after[name, "float32"] - 1) < 1e-3 for name in SIZES)
sys.exit(0 if as_found else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/clip.py"
