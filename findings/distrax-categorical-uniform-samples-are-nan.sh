#!/usr/bin/env bash
# distrax.CategoricalUniform: every sample is NaN if a single bin has a probability below the float32 resolution of the sum before it,
# 3e-8 to 6e-8, thus if one logit is 17 below the others. A histogram that has learned to rule a bin out, or a mask of -inf or -1e9,
# is enough: not the samples of that bin but those of all are lost. log_prob, prob and mean of the same distribution
# are right. 64 bins of a normal density lose all samples too, if they reach 8 standard deviations to both sides.
# The inverse of the cumulated probability sums, over all bins, slope * part of the bin; the slope is width / (difference of two
# cumulated probabilities), 1 / 0 for that bin, and its part is 0: infinity times 0. Uniform over the other bins is what is left.
# The documentation has no bound for logits. MixtureSameFamily of Categorical and Uniform, by which the class is described
# ("Equivalently, ... a mixture of Uniform distributions"), samples it rightly.
# Nothing is raised. It hurts actor-critic agents with a discretized head, whose policy gets sharper as it learns, and all that
# differentiates through the samples, for which this class was made: one such state in a batch makes the loss NaN.
# Right is that mixture, where no gradient of samples is needed, or logits clipped from below at their maximum - 15.
# Here with distrax 0.1.9, the newest release. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'distrax==0.1.9' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/bins.py" <<'PYTHON'
import importlib.metadata
import sys

import distrax
import jax
import jax.numpy as jnp
import numpy as np

print("distrax", importlib.metadata.version("distrax"), "jax", jax.__version__)
SAMPLES = 20_000
wide = np.linspace(-5.0, 5.0, 64)
cases = {
    "four bins, one at -10": (np.array([0.0, 0.0, -10.0, 0.0]), False),
    "four bins, one at -15": (np.array([0.0, 0.0, -15.0, 0.0]), False),
    "four bins, one at -18": (np.array([0.0, 0.0, -18.0, 0.0]), True),
    "four bins, one masked by -inf": (np.array([0.0, -np.inf, 0.0, 0.0]), True),
    "64 bins of a normal density, 3 scales wide": (-((0.6 * wide) ** 2) / 2, False),
    "64 bins of a normal density, 8 scales wide": (-((1.6 * wide) ** 2) / 2, True),
}
as_found = []
for name, (logits, lost) in cases.items():
    bins = len(logits)
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    mean = float(weights @ (np.arange(bins) + 0.5))
    middle = int(weights.argmax()) + 0.25
    distribution = distrax.CategoricalUniform(low=0.0, high=float(bins), logits=jnp.asarray(logits, jnp.float32))
    mixture = distrax.MixtureSameFamily(
        distrax.Categorical(logits=jnp.asarray(logits, jnp.float32)),
        distrax.Uniform(jnp.arange(bins, dtype=jnp.float32), jnp.arange(1.0, bins + 1)),
    )
    drawn = np.asarray(distribution.sample(seed=jax.random.key(0), sample_shape=SAMPLES))
    others = np.asarray(mixture.sample(seed=jax.random.key(0), sample_shape=SAMPLES))
    value, density = float(distribution.mean()), float(distribution.prob(middle))
    print(f"{name:<43} NaN {np.isnan(drawn).mean():.0%} of the samples, mean {drawn.mean():.3f};", end=" ")
    print(f"of the mixture {np.isnan(others).mean():.0%}, {others.mean():.3f}; .mean() {value:.3f}, expected {mean:.3f};", end=" ")
    print(f".prob({middle}) {density:.4f}, expected {weights[int(middle)]:.4f}")
    as_found += [np.isnan(drawn).all() if lost else abs(drawn.mean() - mean) < 0.2]
    as_found += [abs(others.mean() - mean) < 0.2, abs(value - mean) < 1e-3 * bins, abs(density - weights[int(middle)]) < 1e-5]


def loss(logits):
    """Of a batch of two states, of which one has ruled a bin out."""
    sample = distrax.CategoricalUniform(low=-1.0, high=1.0, logits=logits).sample(seed=jax.random.key(1))
    return jnp.mean((sample - 0.3) ** 2)


value, gradient = jax.value_and_grad(loss)(jnp.array([[0.0, 0.5, 0.2, 0.1], [0.0, 0.5, -20.0, 0.1]]))
print(f"loss of a batch of two, one with a logit of -20: {value}, gradient {gradient.tolist()}")
as_found += [bool(jnp.isnan(value)), bool(jnp.isnan(gradient[1]).all())]
sys.exit(0 if all(as_found) else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/bins.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
