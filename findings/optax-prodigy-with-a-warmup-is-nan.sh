#!/usr/bin/env bash
# optax.contrib, prodigy and dadapt_adamw with the schedule that their documentation recommends, a linear one "combined with a 0-20%
# learning rate warmup": all parameters are NaN after one step (prodigy) or two (dadapt_adamw) if the warmup starts at 0, as that of
# optax.warmup_cosine_decay_schedule(0.0, 1.0, ...) does. Gradients, loss and schedule are finite.
# In the first step the weight of the gradients is the rate, 0, so that the sum of gradients is 0 and the estimate of the distance is
# 0 / 0. The maximum of it and the old estimate is NaN, for all steps to come. The implementations of both methods by their authors,
# prodigyopt and dadaptation, return early where the denominator is 0 and take the estimate only for a rate above 0.
# Prodigy has safeguard_warmup=True, "to avoid issues during warm-up stage. Off by default", which is right here; D-Adaptation has no
# such option. A first batch without a gradient, such as one whose tokens are all masked, is NaN with both even at a constant rate,
# and with safeguard_warmup. adamw, dog, dowg, cocob, momo and madgrad of Optax take both without harm.
# Right is a warmup from 1e-3, not from 1e-8: the linear schedule computes (1e-8 - 1) + 1, which is 0 in float32.
# Here with optax 0.2.8. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'optax==0.2.8' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/warmup.py" <<'PYTHON'
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

print("optax", optax.__version__, "jax", jax.__version__)
TARGET, STEPS = jnp.array([0.3, -2.0, 5.0]), 1000


def schedule(first):
    return optax.warmup_cosine_decay_schedule(first, 1.0, warmup_steps=100, decay_steps=STEPS)


def train(optimizer, masked):
    """The parameters after every step; a masked one has no token, thus a gradient of 0."""
    params = jnp.zeros(3)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, weight):
        value, gradient = jax.value_and_grad(lambda p: weight * jnp.sum((p - TARGET) ** 2))(params)
        updates, state = optimizer.update(gradient, state, params, value=value)
        return optax.apply_updates(params, updates), state

    history = []
    for index in range(STEPS):
        params, state = step(params, state, jnp.float32(index not in masked))
        history.append(np.asarray(params))
    return np.array(history)


def tell(name, optimizer, masked=()):
    """The number of steps after which all is NaN, 0 if none is."""
    history = train(optimizer, masked)
    lost = np.isnan(history).all(1)
    first = int(lost.argmax()) + 1 if lost.any() else 0
    right = np.abs(history[-1] - TARGET).max() < 0.05
    print(f"{name:<44} after {STEPS} steps {history[-1].round(2)}", end="")
    print(f", NaN from step {first}" if first else "", ", right" if right else "", sep="")
    return first if first or right else None


contrib = optax.contrib
guarded = functools.partial(contrib.prodigy, safeguard_warmup=True)
results = []
print("expected", np.asarray(TARGET))
for name, method, expected in (
    ("prodigy", contrib.prodigy, (1, 1, 0, 1)),
    ("prodigy, guarded", guarded, (0, 0, 0, 1)),
    ("dadapt_adamw", contrib.dadapt_adamw, (2, 2, 0, 2)),
):
    for first, steps in zip((0.0, 1e-8, 1e-3), expected):
        results.append(tell(f"{name}, warmup from {first}", method(schedule(first))) == steps)
    results.append(tell(f"{name}, rate 1, first batch masked", method(1.0), {0}) == expected[3])
others = {name: getattr(contrib, name) for name in ("dog", "dowg", "cocob", "momo", "madgrad")}
others["adamw"] = functools.partial(optax.adamw, weight_decay=0.0)
for name, method in others.items():
    results.append(tell(f"{name}, warmup from 0.0", method(schedule(0.0))) == 0)
    results.append(tell(f"{name}, rate 1, first batch masked", method(1.0), {0}) == 0)
sys.exit(0 if all(results) else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/warmup.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
