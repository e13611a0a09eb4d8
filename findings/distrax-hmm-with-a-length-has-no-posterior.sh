#!/usr/bin/env bash
# distrax.HMM, forward_backward(obs_seq, length) for padded sequences: the posterior of the states is 0 for every state at every valid
# position, if there is one position of padding. Of 12 observations and length 9 all nine rows of the result sum to 0 instead of 1;
# with length 12, or the same 9 observations without padding, they are right to 6 digits. The log-likelihood and the forward
# probabilities of the same call are right, with any length.
# The documentation: "length: The valid length of the observation sequence, used to truncate the computation for batches of varying
# length". The backward pass sets the positions behind the length to 0 and goes on from there: what it multiplies for all positions
# before is that 0, where it has to start again from ones at the last valid one. Dividing by the sum does not raise, as a sum of 0
# is taken as 1.
# A reader expects P(z | x[:length]) in the first rows. Nothing is raised, and no number is NaN or infinite. It hurts who trains an HMM
# by expectation-maximization on texts or tracks of unequal length: the padded ones give no counts at all, so that the model is
# fitted to the longest sequences of each batch, while the likelihood that is watched is that of all.
# Right is to call it without a length for every sequence, or a backward pass as below. Here with distrax 0.1.9, the newest release.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'distrax==0.1.9' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/hmm.py" <<'PYTHON'
import importlib.metadata
import sys

import distrax
import jax
import jax.numpy as jnp
import numpy as np

STATES, LONGEST = 3, 12
print("distrax", importlib.metadata.version("distrax"), "jax", jax.__version__)
rng = np.random.default_rng(0)
start = rng.dirichlet(np.ones(STATES))
moves = rng.dirichlet(np.ones(STATES), STATES)
means = np.array([-1.0, 0.0, 1.5])
model = distrax.HMM(
    distrax.Categorical(probs=jnp.asarray(start, jnp.float32)),
    distrax.Categorical(probs=jnp.asarray(moves, jnp.float32)),
    distrax.Normal(jnp.asarray(means, jnp.float32), jnp.ones(STATES)),
)
observations = rng.normal(0.0, 1.5, LONGEST)


def posterior(length):
    """P(z | x[:length]) and the log-likelihood by the sum over the past and over the future, in float64."""
    likely = np.exp(-((observations[:length, None] - means) ** 2) / 2) / np.sqrt(2 * np.pi)
    past = np.zeros((length, STATES))
    future = np.ones((length, STATES))
    past[0] = start * likely[0]
    for t in range(1, length):
        past[t] = likely[t] * (past[t - 1] @ moves)
    for t in range(length - 2, -1, -1):
        future[t] = moves @ (likely[t + 1] * future[t + 1])
    joint = past * future
    return joint / joint.sum(-1, keepdims=True), np.log(past[-1].sum())


as_found = []
for length in (12, 11, 9, 2):
    right, likelihood = posterior(length)
    _, _, given, reported = model.forward_backward(jnp.asarray(observations, jnp.float32), length)
    given = np.asarray(given)[:length]
    _, _, alone, _ = model.forward_backward(jnp.asarray(observations[:length], jnp.float32))
    error = np.abs(np.asarray(alone) - right).max()
    print(f"length {length:2d} of {LONGEST}: log-likelihood {float(reported):.4f}, expected {likelihood:.4f};", end=" ")
    print(f"sums of the posterior {given.sum(-1).min():.3f} to {given.sum(-1).max():.3f}, expected 1;", end=" ")
    print(f"first row {given[0].round(3)}, expected {right[0].round(3)}; without padding wrong by {error:.0e}")
    as_found += [abs(float(reported) - likelihood) < 1e-3, error < 1e-4]
    as_found.append(np.abs(given - right).max() < 1e-4 if length == LONGEST else not given.any())
batch = jnp.asarray(np.stack([observations] * 4), jnp.float32)
lengths = jnp.array([12, 10, 8, 6])
counts = jax.vmap(model.forward_backward)(batch, lengths)[2].sum((1, 2))
print(f"counts of states in a batch of lengths {lengths}: {counts.round(2)}, expected the lengths")
as_found.append(np.allclose(counts, [12.0, 0.0, 0.0, 0.0], atol=1e-4))
sys.exit(0 if all(as_found) else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/hmm.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
