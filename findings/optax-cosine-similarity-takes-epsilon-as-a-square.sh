#!/usr/bin/env bash
# optax.cosine_similarity and cosine_distance with an epsilon: the bound applies to the square of the norm, so that vectors up to the
# root of epsilon are scaled down. Two equal vectors of norm 0.05 have the similarity 0.25 at epsilon=0.01, and 0.0625 at 0.04.
# With the small epsilon that one takes to be safe, 1e-6, it is everything below a norm of 0.001.
# The documentation: "epsilon: minimum norm for terms in the denominator of the cosine similarity". At a minimum norm of 0.01 a norm of
# 0.05 is not touched, so 1 is expected. PyTorch bounds the norm, and so did Optax until 0.2.3; since 0.2.4 the source has
# sqrt(clip(sum of squares, epsilon)), with the same documentation.
# optax.ntxent passes the epsilon of the dtype, 1e-7 or in bfloat16 0.0078: there a norm below 0.088 counts as 0.088. Its loss depends
# on the length of the embeddings for that reason, which it is made to ignore: of bfloat16 embeddings of norm 0.02 it is
# 2.3 instead of 0.003, near log(15), that of a model that tells nothing apart; the same embeddings times 100 have the right one.
# Nothing is raised, and all values lie within -1 and 1. It hurts contrastive training whose head starts small, as with a
# zero or small initialization of its last layer, and in half precision most.
# Right is epsilon**2, or the vectors normalized beforehand in float32. Here with optax 0.2.8. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'optax==0.2.8' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/similarity.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

print("optax", optax.__version__, "jax", jax.__version__)
rng = np.random.default_rng(0)
as_found = []


def similarity(a, b, least):
    """By the documentation: norms of at least so much, in float64."""
    return (a * b).sum() / max(np.linalg.norm(a), least) / max(np.linalg.norm(b), least)


direction = rng.normal(size=64)
direction /= np.linalg.norm(direction)
for norm, epsilon in ((0.05, 0.0), (0.05, 1e-2), (0.05, 0.04), (0.5, 1e-2), (1e-4, 1e-6), (1e-3, 1e-5)):
    vector = norm * direction
    array = jnp.asarray(vector, jnp.float32)
    got, squared = (float(optax.cosine_similarity(array, array, epsilon=each)) for each in (epsilon, epsilon**2))
    right = similarity(vector, vector, epsilon)
    print(f"equal vectors of norm {norm}, epsilon {epsilon}: {got:.4f}, expected {right:.4f}; with epsilon**2 {squared:.4f}")
    as_found += [np.isclose(got, min(1.0, norm**2 / epsilon) if epsilon else 1.0, rtol=1e-3), np.isclose(squared, right, rtol=1e-3)]
    if norm**2 < epsilon and norm > epsilon:
        as_found.append(got < 0.5 * right)

CLASSES, EACH, TEMPERATURE = 8, 2, 0.1
centres = rng.normal(size=(CLASSES, 1, 64))
embeddings = (centres + 0.3 * rng.normal(size=(CLASSES, EACH, 64))).reshape(-1, 64)
embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
labels = np.repeat(np.arange(CLASSES), EACH)


def contrast(vectors):
    """The loss of pairs by its formula in float64."""
    unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    scores = np.exp(unit @ unit.T / TEMPERATURE)
    terms = []
    for i, j in zip(*np.nonzero((labels[:, None] == labels) & ~np.eye(len(labels), dtype=bool))):
        terms.append(-np.log(scores[i, j] / (scores[i, j] + scores[i, labels != labels[i]].sum())))
    return float(np.mean(terms))


for dtype in (jnp.float32, jnp.bfloat16):
    for norm in (2.0, 0.2, 0.02, 1e-4):
        array = jnp.asarray(norm * embeddings, dtype)
        got = float(optax.losses.ntxent(array, jnp.asarray(labels), TEMPERATURE))
        right = contrast(np.asarray(array, np.float64))
        print(f"ntxent, {dtype.__name__} embeddings of norm {norm}: {got:.3f}, expected {right:.3f}")
        small = norm < float(jnp.finfo(dtype).eps) ** 0.5
        as_found.append(got > 2 * right + 0.1 if small else abs(got - right) < 0.05)
print(f"log of the number of vectors but the other one of the pair: {np.log(len(labels) - 1):.3f}")
sys.exit(0 if all(as_found) else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/similarity.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
