#!/usr/bin/env bash
# Orbax: two leaves whose keys differ only in where a dot stands are one array in the checkpoint. Of a tree with
# {"params": {"ema": ...}} and {"params.ema": ...} both have one and the same value after saving and restoring, and which
# of the two is kept depends on the order of writing: it changes between runs. Saving succeeds, the metadata lists both
# leaves, restoring with and without a target succeeds. Only if their shapes differ, it is an error.
# Keys with dots are usual where a flat state dict of PyTorch names ("vae.encoder.weight") is kept beside nested parameters,
# or where copies of parameters are named ("params.ema"). The documentation of StandardSave and PyTreeSave names no
# restriction of keys, and the two trees are different ones for jax.tree_util. A reader who thinks of names expects them
# to be escaped, as "/" is: {"params/ema": ...} beside {"params": {"ema": ...}} is restored right.
# The path of a leaf is joined with "." to the name of its array. So it is with OCDBT and without, and in both versions of
# zarr. Here with orbax-checkpoint 0.12.8. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'orbax-checkpoint==0.12.8' 2>/dev/null
cat >"$folder/dots.py" <<'PYTHON'
import itertools
import os
import sys

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp


def tree(separator):
    return {
        "params": {"ema": {"kernel": jnp.full(3, 1.0)}, "kernel": jnp.full(3, 3.0)},
        f"params{separator}ema": {"kernel": jnp.full(3, 2.0)},
    }


def values(restored):
    return jax.tree.map(lambda leaf: float(leaf[0]), restored)


print(f"jax {jax.__version__}, orbax-checkpoint {ocp.__version__}")
merged = {}
for separator, ocdbt, zarr3, again in itertools.product((".", "/"), (True, False), (True, False), range(3)):
    if separator == "/" and not ocdbt:
        continue  # a file of its own for every array
    path = os.path.join(os.environ["FOLDER"], f"{ord(separator)}-{ocdbt}-{zarr3}-{again}")
    saved = tree(separator)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, ocp.args.PyTreeSave(saved))
        restored = values(checkpointer.restore(path))
    copy, other = restored["params"]["ema"]["kernel"], restored[f"params{separator}ema"]["kernel"]
    assert copy in (1, 2) and other in (1, 2) and restored["params"]["kernel"] == 3
    merged.setdefault(separator, []).append(copy == other)
    if again == 0:
        print(f"use_ocdbt={ocdbt}, use_zarr3={zarr3}: saved {values(saved)}, restored {restored}")
with ocp.CheckpointManager(os.path.join(os.environ["FOLDER"], "manager")) as manager:
    manager.save(0, args=ocp.args.StandardSave(tree(".")))
    manager.wait_until_finished()
    restored = values(manager.restore(0, args=ocp.args.StandardRestore(tree("."))))
    print("CheckpointManager, StandardSave, restored with a target:", restored)
as_found = all(merged["."]) and not any(merged["/"])
sys.exit(0 if as_found and restored["params"]["ema"] == restored["params.ema"] else 1)
PYTHON
export JAX_PLATFORMS=cpu FOLDER="$folder"
"$folder/venv/bin/python" "$folder/dots.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
