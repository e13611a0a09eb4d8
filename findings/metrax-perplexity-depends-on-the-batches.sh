#!/usr/bin/env bash
# metrax, Perplexity with sample_weights, the mask of padded texts: the perplexity of a set depends on its batches. Of 64 texts, most
# short and some long, it is 12.1 in one batch, 18.1 in batches of eight sorted by length and 18.7 one by one, all of them the
# same tokens with the same probabilities. merge() weighs a batch by its number of texts, not by the sum of its weights, so that
# a token of a short text counts up to a hundred times as much as one of a long text, unless both meet in a batch.
# The documentation has one formula for all: the exponential of sum(w * -log p) / sum(w). A reader expects merge() to add up
# the two sums, so that an evaluation does not depend on batch size, order, or the number of hosts, and two models evaluated
# with different batches can be compared. Nothing is raised; without weights, and with texts of one length, it is right.
# Right is Average.from_model_output(loss, mask), the same library's weighted mean, of the token losses, and exp of it at the end.
# Here with google-metrax 0.2.4. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'google-metrax==0.2.4' 2>/dev/null
cat >"$folder/perplexity.py" <<'PYTHON'
import functools
import importlib.metadata
import sys

import jax
import metrax
import numpy as np

TEXTS, LENGTH, VOCABULARY = 64, 256, 32
print("google-metrax", importlib.metadata.version("google-metrax"), "jax", jax.__version__)
rng = np.random.default_rng(0)
lengths = np.where(rng.random(TEXTS) < 0.7, rng.integers(2, 20, TEXTS), rng.integers(100, LENGTH, TEXTS))
labels = rng.integers(0, VOCABULARY, (TEXTS, LENGTH))
mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.float32)
logits = rng.normal(size=(TEXTS, LENGTH, VOCABULARY)).astype(np.float32)
known = np.where(np.arange(LENGTH) < 10, 0.5, 1.7)  # a model that predicts better as a text goes on
np.put_along_axis(logits, labels[..., None], known[None, :, None] + rng.normal(size=(TEXTS, LENGTH, 1)), -1)
losses = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), labels[..., None], -1)[..., 0]
exact = float(np.exp((losses * mask).sum() / mask.sum()))
by_length = np.argsort(lengths)
print(f"{TEXTS} texts of {lengths.min()} to {lengths.max()} tokens; exp(sum(w * -log p) / sum(w)) = {exact:.2f}")


def parts(order, size):
    return [order[start : start + size] for start in range(0, TEXTS, size)]


def perplexity(name, order, size, weights=mask):
    metrics = [
        metrax.Perplexity.from_model_output(logits[part], labels[part], sample_weights=weights[part], from_logits=True)
        for part in parts(order, size)
    ]
    value = float(functools.reduce(lambda one, other: one.merge(other), metrics).compute())
    print(f"{name:<52} {value:.2f}")
    return value


order = np.arange(TEXTS)
one = perplexity("Perplexity, one batch", order, TEXTS)
eight = perplexity("Perplexity, batches of 8", order, 8)
buckets = perplexity("Perplexity, batches of 8 sorted by length", by_length, 8)
each = perplexity("Perplexity, one by one", order, 1)
full = np.ones_like(mask)
whole = [perplexity(f"Perplexity, all texts of {LENGTH} tokens, batches of {size}", order, size, full) for size in (TEXTS, 8, 1)]
averages = [metrax.Average.from_model_output(losses[part], mask[part]) for part in parts(by_length, 8)]
average = float(np.exp(functools.reduce(lambda one, other: one.merge(other), averages).compute()))
print(f"{'exp of Average, batches of 8 sorted by length':<52} {average:.2f}")
as_found = abs(one / exact - 1) < 1e-3 and buckets > 1.05 * exact and each > 1.05 * exact and abs(eight / exact - 1) > 1e-3
right = max(whole) - min(whole) < 1e-2 and abs(average / exact - 1) < 1e-3
sys.exit(0 if as_found and right else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/perplexity.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
