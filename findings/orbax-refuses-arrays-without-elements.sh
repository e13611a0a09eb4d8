#!/usr/bin/env bash
# Orbax saves a tree only if every array in it has at least one element: StandardSave of an array of shape (0, 3), sound in
# numpy, jax and safetensors, raises "Cannot save arrays with zero size", and nothing of the tree is written. A row table
# that happens to be empty at a step (no references, no pending rows) has to be left out of the tree, not saved empty.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'orbax-checkpoint==0.12.8' 'safetensors==0.8.0'
export JAX_PLATFORMS=cpu FOLDER="$folder"
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import os
import pathlib
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy

folder = pathlib.Path(os.environ["FOLDER"])
trees = {
    "one element": {"rows": np.ones((1, 3), np.float32), "step": np.int32(1)},
    "no element": {"rows": np.ones((0, 3), np.float32), "step": np.int32(1)},
}
print("jax", jax.__version__, "orbax-checkpoint", ocp.__version__, "safetensors", safetensors.__version__)
found = {}
for name, tree in trees.items():
    target = folder / name.replace(" ", "-")
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(target, args=ocp.args.StandardSave(tree))
        found[name] = "saved"
    except ValueError as error:
        found[name] = f"ValueError: {str(error).split(':')[0]}"
    safetensors.numpy.save_file({"rows": tree["rows"]}, folder / "rows.safetensors")
    back = safetensors.numpy.load_file(folder / "rows.safetensors")["rows"].shape
    print(f"{name}: orbax {found[name]}; directory there: {target.exists()}; safetensors gives {back} back")
as_found = found == {"one element": "saved", "no element": "ValueError: Cannot save arrays with zero size"}
sys.exit(0 if as_found and not (folder / "no-element").exists() else 1)
PYTHON
