#!/usr/bin/env bash
# optax.inject_hyperparams(optax.adam)(1e-3), the documented way to log or change the learning rate, on bfloat16
# parameters: the first update is NaN, and with it all parameters. optax.adam(1e-3) itself trains on them. If all
# parameters are bfloat16, the wrapper stores every hyperparameter in bfloat16: b2 = 0.999 becomes 1, the second moment
# stays 0, its bias correction 1 - b2^t is 0, and 0 / 0 is NaN. One float32 leaf anywhere in the tree (a norm's scale)
# brings all of them back to float32, so that a model of mixed dtypes does not show it, and its adapters alone do.
# Without NaN it is still another optimizer: b2 = 0.997 is stored as 0.99609, a memory of 256 steps instead of 333.
# The documentation of hyperparam_dtype: "Optional datatype override. If specified, all float hyperparameters will be
# cast to this type"; that hyperparameters are cast without it is not said. hyperparam_dtype=jnp.float32 is right, and
# the updates are then float32. Seen alike with optax 0.2.8 on jax 0.8.3 and 0.10.2. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'optax==0.2.8' 2>/dev/null
cat >"$folder/inject.py" <<'PYTHON'
import math
import sys

import jax
import jax.numpy as jnp
import optax

HALF = {"kernel": jnp.ones(2, jnp.bfloat16)}
MIXED = {**HALF, "scale": jnp.ones(2, jnp.float32)}


def first(name, transformation, params):
    """First update of the kernel, for a gradient of 0.5."""
    gradients = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.5), params)
    updates, state = transformation.update(gradients, transformation.init(params), params)
    update, b2 = updates["kernel"], float(getattr(state, "hyperparams", {}).get("b2", 0))
    print(f"{name}: update {float(update[0]):.6f} in {update.dtype}" + (f", injected b2 {b2}" if b2 else ""))
    return float(update[0]), b2


print("jax", jax.__version__, "optax", optax.__version__)
injected = optax.inject_hyperparams(optax.adam)(1e-3)
plain = first("adam, all bfloat16", optax.adam(1e-3), HALF)
lost = first("injected adam, all bfloat16", injected, HALF)
mixed = first("injected adam, one leaf float32", injected, MIXED)
wide = optax.inject_hyperparams(optax.adam, hyperparam_dtype=jnp.float32)(1e-3)
right = first("injected adam, hyperparam_dtype float32", wide, HALF)
_, moved = first("injected adam, b2 0.997", optax.inject_hyperparams(optax.adam)(1e-3, b2=0.997), HALF)
as_found = math.isnan(lost[0]) and lost[1] == 1 and moved == 0.99609375
sys.exit(0 if as_found and all(abs(each[0] + 1e-3) < 1e-5 for each in (plain, mixed, right)) else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/inject.py"
