#!/usr/bin/env bash
# optax.losses.triplet_margin_loss with norm_degree=1, the Manhattan distance: differences are added with their signs and
# cancel. A positive that differs from its anchor by (+10, -10) has distance 0, a negative that is larger than the anchor in all
# features has a negative distance, and the loss grows as it moves away. Of random embeddings half of the triplets have a loss
# of zero that should have one, or the other way round, and a step along the gradient takes half of the features away from the
# positive. With norm_degree=3 the loss of two thirds of them is NaN; with any even degree all is right.
# The distance is (sum of difference ** degree) ** (1 / degree); the absolute value is missing, which even powers do not need.
# The documentation: norm_degree is "The norm degree for distance calculation (default is 2 for Euclidean distance)". A reader
# expects what torch.nn.TripletMarginLoss(p=1) computes, of which this has the arguments margin, p and eps, and
# jnp.linalg.norm(ord=1). It hurts whoever learns embeddings for retrieval, faces or reference images with degree 1, chosen
# against outliers: the loss is small, finite and falls, and the embedding is sorted by the sum of its features. Right is
# jnp.abs of the differences by hand. Here with optax 0.2.8 and jax 0.10.2. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'optax==0.2.8' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/triplet.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

print("jax", jax.__version__, "optax", optax.__version__)


def expected(anchors, positives, negatives, degree):
    """max(|a - p| - |a - n| + 1, 0) with the norm of the degree."""
    near = jnp.linalg.norm(anchors - positives, degree, axis=-1)
    return jnp.maximum(near - jnp.linalg.norm(anchors - negatives, degree, axis=-1) + 1, 0)


def loss(anchors, positives, negatives, degree):
    return optax.losses.triplet_margin_loss(anchors, positives, negatives, norm_degree=degree)


anchor = jnp.zeros((1, 2))
cases = (
    ("positive at (10, -10), negative at (3, 3)", jnp.array([[10.0, -10.0]]), jnp.array([[3.0, 3.0]])),
    ("positive at (0, 0), negative at (3, 3)", jnp.zeros((1, 2)), jnp.array([[3.0, 3.0]])),
)
found = []
for name, positive, negative in cases:
    pair = float(loss(anchor, positive, negative, 1)[0]), float(expected(anchor, positive, negative, 1)[0])
    found.append(tuple(round(each, 2) for each in pair))
    print(f"anchor at (0, 0), {name}, degree 1: loss {pair[0]:5.2f}, expected {pair[1]:5.2f}")
rng = np.random.default_rng(0)
triplets = [jnp.asarray(rng.normal(size=(1000, 64)), jnp.float32) for _ in range(3)]
disagree, downhill, undefined = {}, {}, {}
for degree in (1, 2, 3, 4):
    one, other = loss(*triplets, degree), expected(*triplets, degree)
    disagree[degree] = float(((one > 0) != (other > 0)).mean())
    undefined[degree] = float(jnp.isnan(one).mean())
    anchors = triplets[0]
    positives = jnp.where(jnp.arange(64) % 2, anchors - 1, anchors + 2)
    gradient = jax.grad(lambda each: loss(anchors, each, anchors + 1, degree).sum())(positives)
    towards = jnp.where(jnp.arange(64) % 2, 1.0, -1.0)  # where the anchor is
    downhill[degree] = float((-gradient * towards > 0).mean())
    print(
        f"degree {degree}: zero or not differs in {disagree[degree]:4.0%} of 1000 random triplets, NaN in {undefined[degree]:4.0%};"
        f" features that a step brings nearer to the anchor: {downhill[degree]:4.0%}"
    )
as_found = found[0] == (7, 15) and found[1] == (7, 0)
as_found &= disagree[1] > 0.1 and downhill[1] == 0.5 and undefined[3] > 0.3
right = all(disagree[degree] == undefined[degree] == 0 and downhill[degree] == 1 for degree in (2, 4))
sys.exit(0 if as_found and right else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/triplet.py"
