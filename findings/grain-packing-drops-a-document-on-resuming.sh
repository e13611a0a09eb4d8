#!/usr/bin/env bash
# Grain, documents packed into sequences with ConcatThenSplitIterDataset: an iterator restored from a checkpoint leaves out
# a whole document if the saved position is before the first pack, or after one that ended with a document. All later packs
# are shifted. It depends on the step: some steps resume exactly. Nothing is raised or logged.
# The iterator marks "no remainder" by the tuple (-1, -1). Grain's own CheckpointSave writes the state as JSON, which has
# no tuples; [-1, -1] is not the mark, and the restored iterator takes the next document for a remainder, sliced [-1:-1].
# Handing the state over in memory, with get_state() and set_state(), is right: a test of these two does not show it.
# FirstFitPackIterDataset and BestFitPackIterDataset resume exactly; so does a state whose remainder_slices are turned into
# tuples before set_state(). Seen with grain 0.2.18, orbax-checkpoint 0.12.8. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'grain==0.2.18' 'orbax-checkpoint==0.12.8' 2>/dev/null
cat >"$folder/resume.py" <<'PYTHON'
import json
import os
import sys

import grain
import numpy as np
import orbax.checkpoint as ocp

LENGTHS = {"tokens": 8}
PACKERS = {
    "ConcatThenSplit": lambda data: grain.experimental.ConcatThenSplitIterDataset(data, length_struct=LENGTHS),
    "FirstFit": lambda data: grain.experimental.FirstFitPackIterDataset(data, length_struct=LENGTHS, num_packing_bins=2),
    "BestFit": lambda data: grain.experimental.BestFitPackIterDataset(data, length_struct=LENGTHS, num_packing_bins=2),
}


def packs(packer):
    documents = grain.MapDataset.range(40).map(lambda i: {"tokens": np.full(i % 5 + 1, i)})
    return iter(PACKERS[packer](documents.to_iter_dataset()))


def rest(iterator):
    return [(pack[0] if isinstance(pack, tuple) else pack)["tokens"].tolist() for pack in iterator]


def tuples(state):
    state["remainder_slices"] = {name: tuple(slices) for name, slices in state["remainder_slices"].items()}
    return state


print(f"grain {grain.__version__}, orbax-checkpoint {ocp.__version__}")
inexact = {}
for packer in PACKERS:
    inexact[packer] = []
    for step in range(10):
        saved, restored, in_memory = (packs(packer) for _ in range(3))
        for _ in range(step):
            next(saved)
        state = saved.get_state()
        in_memory.set_state(state)
        with ocp.CheckpointManager(os.path.join(os.environ["FOLDER"], packer, str(step))) as manager:
            manager.save(step, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(saved)))
            manager.wait_until_finished()
            manager.restore(step, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored)))
        expected, got = rest(saved), rest(restored)
        assert rest(in_memory) == expected
        if got != expected:
            inexact[packer].append(step)
            repaired = packs(packer)
            repaired.set_state(tuples(json.loads(json.dumps(state))))
            assert rest(repaired) == expected
            print(f"{packer}, saved after {step} packs: next is {expected[0]}, after restoring {got[0]}")
    print(f"{packer}: resumes with other packs when saved after {inexact[packer]} of 0 to 9 packs")
lost = inexact.pop("ConcatThenSplit")
sys.exit(0 if 0 in lost and 0 < len(lost) < 10 and not any(inexact.values()) else 1)
PYTHON
export JAX_PLATFORMS=cpu FOLDER="$folder"
"$folder/venv/bin/python" "$folder/resume.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
