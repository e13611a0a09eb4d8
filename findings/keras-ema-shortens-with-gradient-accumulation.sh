#!/usr/bin/env bash
# Keras 3, use_ema with gradient_accumulation_steps: the moving average is updated at every batch, not at every update of the weights.
# With k batches an update its momentum is that to the power k. At ema_momentum=0.99 it lies 99 updates behind the weights
# without accumulation, 25 with 4 batches, 13 with 8, 7 with 16: the average all but follows the weights.
# The documentation: "new_average = ema_momentum * old_average + (1 - ema_momentum) * current_variable_value" and, of accumulation,
# "model & optimizer variables will not be updated at every step", "EMA frequency will look at accumulated iterations value (optimizer
# steps // gradient_accumulation_steps)". A reader expects what accumulation is for: the training of a batch k times as large.
# It hurts whoever splits a batch to fit it into memory and keeps the momentum of the recipe, 0.9999 of diffusion models: fit()
# ends with averaged weights that are averaged over a k-th of the updates, with more noise in them, and nothing shows it.
# Right is ema_momentum ** (1 / k). Here with Keras 3.15.1. Exits 0 while that is so.
# Matters to: training of generators and of all models with averaged weights in Keras, on all backends.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'keras==3.15.1' 'jax==0.10.2' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/average.py" <<'PYTHON'
import sys

import jax
import keras
import numpy as np
from jax import numpy as jnp

print("keras", keras.__version__, "backend", keras.backend.backend(), "jax", jax.__version__)


def lag(momentum, batches):
    """How many updates the average lies behind weights that go one unit an update, right after an update."""
    weight = keras.Variable(np.zeros(1, "float32"))
    accumulation = {"gradient_accumulation_steps": batches} if batches > 1 else {}
    optimizer = keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=momentum, **accumulation)
    optimizer.build([weight])
    updates = int(12 / (1 - momentum))

    def step(_, state):
        weights, variables = optimizer.stateless_apply(state[1], [-jnp.ones(1)], state[0])
        return weights, variables

    state = [weight.value], [variable.value for variable in optimizer.variables]
    weights, variables = jax.jit(lambda state: jax.lax.fori_loop(0, updates * batches, step, state))(state)
    names = [variable.path for variable in optimizer.variables]
    average = variables[next(index for index, name in enumerate(names) if "average" in name)]
    assert float(weights[0][0]) == updates
    return float(weights[0][0] - average[0])


ok = []
for momentum in (0.9, 0.99):
    exact = momentum / (1 - momentum)
    print(f"ema_momentum={momentum}: {exact:.1f} updates behind by definition")
    for batches in (1, 2, 4, 8, 16):
        found, power = lag(momentum, batches), momentum / (1 - momentum**batches)
        mended = lag(momentum ** (1 / batches), batches)
        print(f"  {batches:>2} batches an update: {found:6.2f}, with momentum ** (1 / {batches}) {mended:6.2f}")
        ok += [abs(found - power) < 0.02 * power, exact - 0.05 <= mended < exact + 1.05]
sys.exit(0 if all(ok) else 1)
PYTHON
KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/average.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
