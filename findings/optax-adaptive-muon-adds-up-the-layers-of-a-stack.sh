#!/usr/bin/env bash
# optax.contrib.muon and scale_by_muon with adaptive=True on stacked layers [layers in out], as nn.scan keeps them: every layer's update
# is multiplied by the sum over all layers instead of its own. 28 equal layers take steps of 28 times the size. Of layers whose
# gradients differ by a factor of 100, all get the same size, which is that of the largest. The same matrices as 28 leaves are right.
# adaptive=True scales the orthogonal matrix O by <G, O>, the dual norm of the gradient G. With dimension numbers G and O are
# stacks, the orthogonalization goes over the axes that are left by vmap, but the product is jnp.sum of the whole array.
# The documentation: "adaptive: Whether to scale the updates by the dual norm of the original updates", with a paper whose norm is that
# of a matrix; and "all axes not specified as reduction or output axes are considered batch axes and will be considered
# independently". A reader expects that a stack is trained as its matrices are, as it is with adaptive=False.
# Nothing is raised. It hurts whoever moves a model from a list of layers to a scan: the learning rate no longer fits.
# Right is jax.vmap of the optimizer over the layers, or adaptive=False. Here with optax 0.2.8. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'optax==0.2.8' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/stack.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

print("optax", optax.__version__, "jax", jax.__version__)
LAYERS, INPUTS, OUTPUTS = 28, 32, 48
AXES = optax.contrib.MuonDimensionNumbers(-2, -1)
rng = np.random.default_rng(0)
one = rng.normal(size=(INPUTS, OUTPUTS))
as_found = []


def update(gradient, **kwargs):
    muon = optax.contrib.scale_by_muon(weight_dimension_numbers=AXES, nesterov=False, **kwargs)
    gradient = jnp.asarray(gradient, jnp.float32)
    return np.asarray(muon.update(gradient, muon.init(gradient))[0], np.float64)


def iterate(gradient, steps=5):
    """The quintic Newton-Schulz iteration and the dual norm of one matrix, in float64."""
    x = gradient / np.linalg.norm(gradient)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x, (gradient * x).sum()


def size(updates):
    return np.linalg.norm(updates, axis=(-2, -1))


for name, factors in (
    ("28 equal layers", np.ones(LAYERS)),
    ("gradients from 1 to 0.01", np.geomspace(1.0, 0.01, LAYERS)),
    ("a single layer", np.ones(1)),
):
    gradients = factors[:, None, None] * one
    right, plain = [], []
    for gradient in gradients:
        orthogonal, norm = iterate(gradient)
        right.append(norm * orthogonal)
        plain.append(orthogonal)
    right, plain = np.array(right), np.array(plain)
    stacked, leaves = update(gradients, adaptive=True), np.array([update(each, adaptive=True) for each in gradients])
    error = np.abs(update(gradients) / plain - 1).max()
    print(f"{name}: norm of the first and last update {size(stacked)[[0, -1]].round(1)} stacked,", end=" ")
    print(f"{size(leaves)[[0, -1]].round(1)} as leaves, expected {size(right)[[0, -1]].round(1)};", end=" ")
    print(f"largest relative error with adaptive=False {error:.0e}")
    as_found += [np.allclose(leaves, right, rtol=1e-2, atol=1e-3), np.allclose(update(gradients), plain, rtol=1e-2, atol=1e-3)]
    total = sum((gradient * orthogonal).sum() for gradient, orthogonal in zip(gradients, plain))
    as_found.append(np.allclose(stacked, total * plain, rtol=1e-2, atol=1e-2 * total))
    as_found.append(np.allclose(size(stacked) / size(right), total / (factors * total / factors.sum()), rtol=1e-2))
sys.exit(0 if all(as_found) else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/stack.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
