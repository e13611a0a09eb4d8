#!/usr/bin/env bash
# flax.nnx.metrics, Average and Accuracy with a mask that is broadcast: an accuracy of 400 %. For labels [B T] and a mask [B 1] of
# padding rows, as of the last batch of a set, 4 right answers of 8 per row give 4.0 instead of 0.5. A mask [T] of positions is
# divided by T instead of B * T, and counts B times too much. MultiMetric passes the same mask on to all of its metrics, so that
# those whose values have the shape of the mask are right beside it.
# The documentation of update() says that the "mask shape should be broadcastable to the shape of values array". The total is the
# sum of values * mask, which broadcasts; the count is mask.sum(), which does not. A reader expects the mean over the values that
# the broadcast mask keeps, as from jnp.mean(values, where=mask), and as from clu.metrics. Nothing is raised. An average that is
# not known to be at most 1, such as a loss, does not show it, and a batch without broadcasting is right, so that the error
# depends on which batches have a mask: they count T times as much in the total as in the count.
# Right is to broadcast first: mask=jnp.broadcast_to(mask, values.shape).
# Seen alike with flax 0.12.8 and 0.12.12. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'flax==0.12.8' 2>/dev/null
cat >"$folder/metrics.py" <<'PYTHON'
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

B, T, CLASSES = 6, 8, 5
print("flax", flax.__version__, "jax", jax.__version__)
rng = np.random.default_rng(0)
labels = rng.integers(0, CLASSES, (B, T)).astype(np.int32)
answers = np.where(np.arange(T) < T // 2, labels, (labels + 1) % CLASSES)  # half of every row is right
logits = jnp.asarray(np.eye(CLASSES, dtype=np.float32)[answers])
losses = jnp.asarray(rng.gamma(2.0, size=(B, T)).astype(np.float32))
masks = {
    "[B T]": jnp.asarray(rng.random((B, T)) < 0.7),
    "[B 1]": jnp.asarray([[True]] * (B - 2) + [[False]] * 2),
    "[T]": jnp.arange(T) < 6,
}
as_found = []
for shape, mask in masks.items():
    metric = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))
    metric.update(logits=logits, labels=jnp.asarray(labels), loss=losses, mask=mask)
    got = {name: float(value) for name, value in metric.compute().items()}
    right = {
        "accuracy": float(jnp.mean(answers == labels, where=mask)),
        "loss": float(jnp.mean(losses, where=mask)),
    }
    factor = B * T / mask.size  # positions of an element of the mask
    print(f"mask {shape:<6}" + "".join(f" {name} {got[name]:.3f}, expected {right[name]:.3f};" for name in right))
    as_found += [np.isclose(got[name], factor * right[name], rtol=1e-5) for name in right]

running = nnx.metrics.Accuracy()
for mask in (None, masks["[B 1]"]):  # a full batch and the last one
    running.update(logits=logits, labels=jnp.asarray(labels), mask=mask)
print(f"accuracy of a full batch and the last one: {float(running.compute()):.3f}, expected 0.500")
as_found.append(np.isclose(float(running.compute()), (B * T / 2 + (B - 2) * T / 2) / (B * T + B - 2), rtol=1e-5))

wide = nnx.metrics.Accuracy()
wide.update(logits=logits, labels=jnp.asarray(labels), mask=jnp.broadcast_to(masks["[B 1]"], labels.shape))
print(f"accuracy with the mask broadcast first: {float(wide.compute()):.3f}")
sys.exit(0 if all(as_found) and float(wide.compute()) == 0.5 else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/metrics.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
