#!/usr/bin/env bash
# rlax.popart: the statistics of the targets move by step_size times the number of targets of the batch. With step_size=0.01 and 8
# or 150 targets a batch the mean and scale are right; from 200 on they swing beyond all bounds. With 210 the mean is -1e13 after 300
# batches of mean 5 and the scale its lower bound, with 256 both are NaN, as are the parameters of the value head. 256 targets are a
# small batch: 32 sequences of 8 steps.
# The differences target - mean of all targets of one index are summed and multiplied by the step: a batch of N is one step of
# N * step_size, and beyond 2 it overshoots by more than it corrects. With axis_name the replicas are summed as well, so that the same
# program is right on one device and NaN on eight.
# The documentation: "step_size: The step size for learning the scale & shift parameters", and targets of any shape. The paper,
# arXiv 1602.07714, moves by a share of the difference, so that a step below 1 cannot leave the range of the targets; a reader
# expects a moving average, as create_ema of the same library is one, or N of its steps one after the other.
# Nothing is raised. Outputs are preserved by design, so that nothing is seen in the values until the scale collapses: then the
# normalized targets, and with them the gradients, are 20,000 times too large.
# Right is step_size divided by the number of targets of an index, over all replicas. Here with rlax 0.1.9, the newest release.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'rlax==0.1.9' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/popart.py" <<'PYTHON'
import importlib.metadata
import sys

import jax
import jax.numpy as jnp
import numpy as np
import rlax

STEP, MEAN, SCALE, BATCHES, BOUND = 0.01, 5.0, 2.0, 300, 1e-4
print("rlax", importlib.metadata.version("rlax"), "jax", jax.__version__)


def train(number, step, devices=1):
    """Mean and scale after batches of so many targets, and a weight of the value head, which starts as 1."""
    axis = "device" if devices > 1 else None
    initial, update = rlax.popart(1, step, BOUND, 1e6, axis_name=axis)
    update = jax.jit(jax.vmap(update, (None, None, 0, 0), axis_name=axis) if axis else update)
    state = initial()
    head = {"w": jnp.ones((4, 1)), "b": jnp.zeros(1)}
    rng = np.random.default_rng(0)
    shape = (devices, number // devices) if axis else (number,)
    for _ in range(BATCHES):
        targets = jnp.asarray(rng.normal(MEAN, SCALE, shape), jnp.float32)
        head, state = update(head, state, targets, jnp.zeros(shape, jnp.int32))
        if axis:  # the same on all devices
            head, state = jax.tree.map(lambda leaf: leaf[0], (head, state))
    return float(state.shift[0]), float(state.scale[0]), float(head["w"][0, 0])


def average(number, step):
    """A moving average of the batches' means in float64."""
    rng = np.random.default_rng(0)
    mean, square = 0.0, 1.0
    for _ in range(BATCHES):
        targets = rng.normal(MEAN, SCALE, number)
        mean += step * (targets.mean() - mean)
        square += step * ((targets**2).mean() - square)
    return mean, np.sqrt(square - mean**2)


def tell(name, found, expected):
    print(f"{name:<52} mean {found[0]:9.3g} scale {found[1]:8.3g} weight {found[2]:8.3g};", end=" ")
    print(f"expected mean {expected[0]:.2f} scale {expected[1]:.2f}")
    return found


def near(found, share=0.3):
    return abs(found[0] - MEAN) < share * SCALE and abs(found[1] - SCALE) < share * SCALE


as_found = []
for number in (8, 150, 210, 256, 1024):
    found = tell(f"{number} targets, step {STEP}", train(number, STEP), average(number, STEP))
    right = tell(f"{number} targets, step {STEP} / {number}", train(number, STEP / number), average(number, STEP))
    as_found.append(np.allclose(right[:2], average(number, STEP), rtol=1e-2))
    as_found.append(near(found) if number <= 150 else np.isnan(found).all() if number > 210 else found[1] <= 1.01 * BOUND)
found = tell("32 targets on each of 8 devices", train(256, STEP, devices=8), average(256, STEP))
as_found.append(bool(np.isnan(found).all()))
sys.exit(0 if all(as_found) else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/popart.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
