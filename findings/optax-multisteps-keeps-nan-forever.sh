#!/usr/bin/env bash
# optax.MultiSteps(optax.apply_if_finite(adam, ...), every_k_schedule=4), gradient accumulation around an optimizer that is
# guarded against NaN: after one micro-batch with a NaN or an infinity no update is ever made again. All later gradients are
# sound, and the guard rejects every one: the parameters stay as they are, the loss stands still, nothing is raised. After
# max_consecutive_errors the guard lets the NaN through, and all parameters are NaN.
# MultiSteps begins a new mean by multiplying the old one by zero, and NaN times 0, as infinity times 0, is NaN: the
# accumulator never recovers. It hurts whoever trains in float16 or bfloat16 with accumulation, where an infinite gradient now
# and then is expected, and whoever tests the guard without accumulation, where it works.
# The documentation of MultiSteps: after an update the "accumulated gradients are then set back to zero and the process starts
# again"; that of apply_if_finite: it makes an optimizer "robust to a few NaNs or Infs". A reader expects that the update of
# these four micro-batches is lost, and no other.
# Right are the guard outside, apply_if_finite(MultiSteps(...).gradient_transformation(), ...), and MultiSteps with
# should_skip_update_fn=optax.skip_not_finite. Seen alike with optax 0.2.8, jax 0.10.2 and 0.12.0.1.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'optax==0.2.8' 2>/dev/null
cat >"$folder/accumulate.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import optax

K, BAD, STEPS = 4, 9, 80  # micro-batches of an update, the one that is not finite, all of them
ADAM = optax.adam(0.1)


def guard(optimizer):
    return optax.apply_if_finite(optimizer, max_consecutive_errors=10)


def moves(name, optimizer, bad, steps=STEPS):
    """Updates that change the parameter after the bad micro-batch, and the parameter at the end."""
    update = jax.jit(optimizer.update)
    parameter = jnp.float32(0)
    state = optimizer.init(parameter)
    after = 0
    for step in range(steps):
        gradient = jnp.float32(bad if step == BAD else 1)
        change, state = update(gradient, state, parameter)
        parameter = optax.apply_updates(parameter, change)
        after += bool(step > BAD and change != 0 and jnp.isfinite(change))
    print(f"{name}, gradient {bad} at {BAD} of {steps}: {after} updates afterwards, parameter {parameter:.2f}")
    return after, parameter


print("jax", jax.__version__, "optax", optax.__version__)
accumulated = optax.MultiSteps(guard(ADAM), K)
held, finite = [], []
for bad in (float("nan"), float("inf")):
    few = moves("MultiSteps(apply_if_finite(adam))", accumulated, bad, steps=48)
    many = moves("the same, more micro-batches", accumulated, bad)
    held += [few[0] == many[0] == 0, abs(few[1] + 0.2) < 1e-3, bool(jnp.isnan(many[1]))]  # 2 updates before the bad one
    finite += [
        moves("apply_if_finite(adam)", guard(ADAM), bad)[0] == STEPS - BAD - 1,
        moves("apply_if_finite(MultiSteps(adam))", guard(optax.MultiSteps(ADAM, K).gradient_transformation()), bad)[0] >= 17,
        moves(
            "MultiSteps(adam, skip_not_finite)", optax.MultiSteps(ADAM, K, should_skip_update_fn=optax.skip_not_finite), bad
        )[0]
        >= 17,
    ]
finite.append(moves("MultiSteps(apply_if_finite(adam))", accumulated, 1.0)[0] == (STEPS - BAD) // K + 1)
sys.exit(0 if all(held) and all(finite) else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/accumulate.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
