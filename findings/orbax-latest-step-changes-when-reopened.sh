#!/usr/bin/env bash
# A run diverges, goes back from checkpoint 300 to 100 and trains on in the same directory. Orbax's CheckpointManager
# then saves nothing until step 300 is passed: save(150) returns False, without a message. With force=True it saves, but
# - latest_step() is 150 in that process and 300 in the next: a preempted job resumes from the diverged checkpoint;
# - with max_to_keep=3 the new checkpoint pushes out 100, the good one it came from, and keeps 200 and 300 of the
#   abandoned branch; after reopening, the order is another one, and the next save of 160 deletes 150, its predecessor.
# Checkpoints are ordered by the time of saving while the manager lives, and by step when it reads the directory.
# preservation_policy=LatestN(3) behaves as max_to_keep=3. The documentation: latest_step() "Returns the latest step
# saved", LatestN "Preserves the last n checkpoints", and force "will attempt to save a checkpoint regardless of the
# result of AbstractCheckpointManager.should_save(step)"; that the order depends on the process it does not say.
# Deleting the later steps with delete() before going on is right. Seen with orbax-checkpoint 0.12.8.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'orbax-checkpoint==0.12.8' 2>/dev/null
cat >"$folder/back.py" <<'PYTHON'
import sys
import tempfile

import numpy as np
import orbax.checkpoint as ocp

seen = []


def session(name, directory, *steps, remove=(), **options):
    """Opens the directory, deletes and saves steps, and reports."""
    with ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(max_to_keep=3)) as manager:
        opened = manager.latest_step()
        for step in remove:
            manager.delete(step)
        saved = []
        for step in steps:
            saved.append(manager.save(step, args=ocp.args.StandardSave({"weights": np.full(2, step)}), **options))
            manager.wait_until_finished()
        seen.append((opened, saved, sorted(manager.all_steps()), manager.latest_step()))
    outcome = f"save {list(steps)} gives {saved}, kept {seen[-1][2]}, latest {seen[-1][3]}"
    print(f"{name}: latest when opened {opened}, {outcome}")


print("orbax-checkpoint", ocp.__version__)
directory = tempfile.mkdtemp(dir=sys.argv[1])
session("diverging run", directory, 100, 200, 300)
session("back at 100", directory, 150)
session("back at 100, force=True", directory, 150, force=True)
session("next process, force=True", directory, 160, force=True)
directory = tempfile.mkdtemp(dir=sys.argv[1])
session("diverging run", directory, 100, 200, 300)
session("back at 100, later ones deleted", directory, 150, remove=(200, 300))
session("next process", directory, 160)
sys.exit(
    seen
    != [
        (None, [True, True, True], [100, 200, 300], 300),
        (300, [False], [100, 200, 300], 300),
        (300, [True], [150, 200, 300], 150),
        (300, [True], [160, 200, 300], 160),
        (None, [True, True, True], [100, 200, 300], 300),
        (300, [True], [100, 150], 150),
        (150, [True], [100, 150, 160], 160),
    ]
)
PYTHON
export JAX_PLATFORMS=cpu
"$folder/venv/bin/python" "$folder/back.py" "$folder" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
