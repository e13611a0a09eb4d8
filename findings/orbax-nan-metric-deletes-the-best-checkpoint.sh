#!/usr/bin/env bash
# Orbax, CheckpointManager with best_fn: one metric that is NaN makes it delete the best checkpoint. Of the losses
# 1.0, 0.3, nan, 0.5, 0.4, 0.45 with max_to_keep=2 and best_mode="min" it keeps 0.4 and 0.45; without the NaN it keeps
# 0.3 and 0.4. best_step() can also be the step of the NaN. Checkpoints are ranked by sorted(), which NaN among the
# keys leaves unsorted. Nothing is raised or logged.
# The documentation: "If max_to_keep is also set, then the retained checkpoints will be kept based on their quality".
# A reader expects that NaN is refused or ranks last, as a metric of NaN is saved and read back.
# A best_fn that returns infinity for NaN (best_mode "min") keeps the best. preservation_policy.BestN behaves as
# best_fn. Seen alike with orbax-checkpoint 0.11.40 and 0.12.8.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'orbax-checkpoint==0.12.8' 2>/dev/null
cat >"$folder/best.py" <<'PYTHON'
import math
import sys
import tempfile

import numpy as np
import orbax.checkpoint as ocp

NAN = math.nan


def kept(losses, best_fn=lambda metrics: metrics["loss"]):
    options = ocp.CheckpointManagerOptions(max_to_keep=2, best_fn=best_fn, best_mode="min")
    with ocp.CheckpointManager(tempfile.mkdtemp(dir=sys.argv[1]), options=options) as manager:
        for step, loss in enumerate(losses):
            manager.save(step, args=ocp.args.StandardSave({"weights": np.ones(2)}), metrics={"loss": loss})
            manager.wait_until_finished()
        steps, best = manager.all_steps(), manager.best_step()
    print(f"losses {losses}: kept {[losses[step] for step in steps]}, best_step() is that of {losses[best]}")
    return [losses[step] for step in steps], losses[best]


print("orbax-checkpoint", ocp.__version__)
plain = kept([1.0, 0.3, 0.5, 0.4, 0.45])
lost = kept([1.0, 0.3, NAN, 0.5, 0.4, 0.45])
best = kept([0.3, 0.4, 0.5, NAN])[1]
print("best_fn that ranks NaN last:")
ranked = kept([1.0, 0.3, NAN, 0.5, 0.4, 0.45], lambda metrics: np.nan_to_num(metrics["loss"], nan=math.inf))
as_found = plain == ranked == ([0.3, 0.4], 0.3) and lost == ([0.4, 0.45], 0.4) and math.isnan(best)
sys.exit(0 if as_found else 1)
PYTHON
export JAX_PLATFORMS=cpu
"$folder/venv/bin/python" "$folder/best.py" "$folder" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
