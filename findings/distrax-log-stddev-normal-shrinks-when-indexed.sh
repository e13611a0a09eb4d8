#!/usr/bin/env bash
# distrax.LogStddevNormal with max_scale: an element of a batch is another distribution than the batch has there. dist[0] of a scale
# of 0.952 has 0.488, dist[:] has smaller scales than dist, and with every further index they get smaller again: 0.5, 0.333, 0.25,
# 0.2. The log-density of dist[0] differs from that of dist at the same place, and the KL divergence of dist[:] from dist,
# the same distribution, is 0.01 to 0.3 instead of 0, the more the larger the scale.
# The soft threshold, log(max_scale) - softplus(log(max_scale) - log_scale), is applied when the object is made, to what it stores as
# log_scale; an index makes a new object of the stored value and the same max_scale, which applies it once more. Without max_scale an
# index is right, as it is for Normal, so that tests of the default do not see it. Slices in an actor-critic loss, dist[:-1] for the
# states without the last one, are what it hurts: the ratio of a probability to itself runs from 0.03 to 4.3 for actions of five
# numbers, by Independent(LogStddevNormal(...), 1), which hands the index on.
# The documentation: log_scale is "The log standard deviation (after thresholding, if applicable)"; nothing says that an index changes
# the distribution, and nothing is raised.
# Right is to index the parameters before the distribution is made. Here with distrax 0.1.9, the newest release.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'distrax==0.1.9' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/index.py" <<'PYTHON'
import importlib.metadata
import sys

import distrax
import jax
import jax.numpy as jnp
import numpy as np

print("distrax", importlib.metadata.version("distrax"), "jax", jax.__version__)
BOUND = 1.0
log_scale = np.array([-2.0, -1.0, 0.0, 1.0, 3.0])
loc = np.zeros(5)
right = np.exp(np.log(BOUND) - np.logaddexp(0.0, np.log(BOUND) - log_scale))  # the formula of the documentation, in float64
as_found = []


def density(value, scale):
    return -((value / scale) ** 2) / 2 - np.log(scale) - np.log(2 * np.pi) / 2


batch = distrax.LogStddevNormal(jnp.asarray(loc), jnp.asarray(log_scale), max_scale=BOUND)
one = np.array([float(batch[index].scale) for index in range(5)])
print(f"scale of the batch {np.asarray(batch.scale).round(3)}, expected {right.round(3)}; of its elements {one.round(3)}")
as_found += [np.allclose(batch.scale, right, rtol=1e-5), np.allclose(one, right / (1 + right / BOUND), rtol=1e-5)]
nothing = distrax.LogStddevNormal(jnp.asarray(loc), jnp.asarray(log_scale))
as_found.append(np.allclose([float(nothing[index].scale) for index in range(5)], np.exp(log_scale), rtol=1e-5))
print(f"without max_scale the elements are right: {as_found[-1]}")

value = 1.0
together, alone = np.asarray(batch.log_prob(value)), np.array([float(batch[index].log_prob(value)) for index in range(5)])
print(f"log-density at {value}: batch {together.round(2)}, elements {alone.round(2)}, expected {density(value, right).round(2)}")
as_found += [np.allclose(together, density(value, right), rtol=1e-4), np.abs(alone - together).min() > 0.05]
divergence = np.asarray(batch[:].kl_divergence(batch))
print(f"KL divergence of batch[:] from batch: {divergence.round(3)}, expected 0")
as_found.append(divergence.max() > 0.1)

chain, scales = distrax.LogStddevNormal(jnp.zeros(1), jnp.zeros(1), max_scale=BOUND), []
for _ in range(4):
    scales.append(float(chain.scale[0]))
    chain = chain[:]
print(f"scale after 0, 1, 2 and 3 times [:]: {np.round(scales, 3)}")
as_found.append(np.allclose(scales, [1 / 2, 1 / 3, 1 / 4, 1 / 5], rtol=1e-4))

actions = np.random.default_rng(0).normal(0.0, right, (8, 5))
policy = distrax.Independent(distrax.LogStddevNormal(jnp.zeros((8, 5)), jnp.tile(jnp.asarray(log_scale), (8, 1)), BOUND), 1)
ratio = np.exp(np.asarray(policy[:-1].log_prob(actions[:-1])) - np.asarray(policy.log_prob(actions))[:-1])
print(f"ratios of the probabilities of seven states, policy[:-1] to policy: {ratio.round(2)}, expected 1")
as_found.append(np.abs(ratio - 1).max() > 0.3)
sys.exit(0 if all(as_found) else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/index.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
