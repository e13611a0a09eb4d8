#!/usr/bin/env bash
# jax 0.10.2 on CPU: jax.lax.optimization_barrier holds nothing back, and jax.checkpoint, which rests on it, makes a program
# larger. Sixteen layers written as a Python loop need 132 MB of temporaries for their gradient, with jax.checkpoint around
# each layer 160 MB; around groups of four they are 139 MB and 23 % more arithmetic: the cost of recomputing without its gain.
# XLA removes the barriers before it merges common subexpressions, fuses and schedules, so that the second forward pass of a
# layer is merged with the first, or computed long before it is needed. The same layers in lax.scan are right (46 instead of
# 380 MB), as a loop is a border that stays; with jax 0.12.0.1 all forms are right (42 MB).
# The documentation of optimization_barrier: it "prevents common subexpression elimination. This is used by JAX to implement
# rematerialization", and barriers "prevent compiler fusions"; jax.checkpoint has prevent_cse=True for just such loops. Whoever
# plans memory on a host, or compares policies and groupings there, learns that none of them saves anything. jax 0.10.2 is the
# last release for Python 3.11.
# The barrier is also the documented way to stop a fusion that repeats work. Six 3 x 3 depthwise layers of shifted products
# take 3.5 times the arithmetic of six single ones when compiled together, with a barrier between them as without: each
# output of a layer is computed again for several shifts of the next. With jax 0.12.0.1 the factor is the same without a
# barrier, and 1 with it. Programs of one layer each, called in turn, are right in both.
# Counted from the compiled programs (memory_analysis, cost_analysis); nothing is run or timed. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 2>/dev/null
cat >"$folder/barrier.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp

LAYERS, GROUP, WIDTH, ROWS = 16, 4, 64, 8192
BARRIER = jax.lax.optimization_barrier


def layer(x, weights):
    return jnp.tanh(jax.nn.gelu(x @ weights) * jnp.sin(x))


def several(x, weights, layer=layer):
    for one in weights:
        x = layer(x, one)
    return x


def loop(layer):
    return lambda weights, x: several(x, weights, layer).sum()


def groups(weights, x):
    for start in range(0, LAYERS, GROUP):
        x = jax.checkpoint(several)(x, weights[start : start + GROUP])
    return x.sum()


def scan(layer):
    return lambda weights, x: jax.lax.scan(lambda x, one: (layer(x, one), None), x, weights)[0].sum()


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def memory(name, program):
    """Temporaries of the gradient in MB, and its arithmetic."""
    compiled = jax.jit(jax.grad(program)).lower(shape(LAYERS, WIDTH, WIDTH), shape(ROWS, WIDTH)).compile()
    megabytes, operations = compiled.memory_analysis().temp_size_in_bytes / 1e6, compiled.cost_analysis()["flops"] / 1e9
    print(f"gradient, {name:<36} {megabytes:6.1f} MB of temporaries, {operations:.2f} G operations")
    return megabytes, operations


def depthwise(x, kernel):
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(padded[:, i : i + height, j : j + width] * kernel[i, j] for i in range(3) for j in range(3))


def work(name, count, barrier=False):
    """Operations for a layer and an element."""

    def program(x, kernels):
        for kernel in kernels:
            x = depthwise(x, kernel)
            x = BARRIER(x) if barrier else x
        return x

    x = shape(2, 32, 32, 256)
    compiled = jax.jit(program).lower(x, shape(count, 3, 3, 256)).compile()
    operations = compiled.cost_analysis()["flops"] / count / x.size
    print(f"{name:<36} {operations:.1f} operations for each layer and element, expected 17")
    return operations


print("jax", jax.__version__)
plain, arithmetic = memory("loop", loop(layer))
each, _ = memory("loop, jax.checkpoint of each layer", loop(jax.checkpoint(layer)))
grouped, more = memory("loop, jax.checkpoint of four layers", groups)
scanned, _ = memory("scan", scan(layer))
saved, _ = memory("scan, jax.checkpoint of each layer", scan(jax.checkpoint(layer)))
one = work("one depthwise layer", 1)
six = work("six depthwise layers", 6)
held = work("six depthwise layers, barriers", 6, barrier=True)
without_effect = each > 0.9 * plain and grouped > 0.7 * plain and more > 1.2 * arithmetic and held > 0.9 * six > 2 * one
sys.exit(0 if without_effect and saved < 0.3 * scanned else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/barrier.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
