#!/usr/bin/env bash
# pytorch_optimizer, parameters that get their first gradient late: with AdamP, Yogi, Apollo, AdEMAMix, GaLore, FlashAdamW
# and many more their first steps are 2.5 to 5 times the learning rate if the other parameters of the group have taken 1000
# steps, with AdaBelief up to 11 times, with LaProp 25 times in the very first. With Adan and StableAdamW the first step is
# a fifth and a tenth. The same gradients from the beginning give steps of one learning rate, and torch's AdamW does so at
# any time.
# Averages that begin at zero are corrected by how many gradients they have seen. The number is counted for the group of
# parameters here, not for each parameter: averages of one gradient get the correction of a thousand. Parameters without a
# gradient are skipped. A group all of whose parameters are frozen counts on as well.
# torch counts for each parameter, and so does the code of the authors of AdaBelief, AdamP and LaProp. The documentation has
# no word of it. A reader expects that a frozen layer starts as a new one.
# It hurts when a text encoder or an autoencoder is unfrozen during training, when layers grow or are skipped at random,
# when experts or branches get no token for a while (zero_grad sets gradients to None), and at a switch of stages with one
# optimizer: the loss jumps when the layer joins, as if its learning rate were too high. Stages that are resumed with a new
# optimizer do not.
# Right is add_param_group at the time of unfreezing; a group that was there from the beginning does not help. Here with
# pytorch_optimizer 4.1.0. Exits 0 while that is so.
# Matters to: staged training of encoders, generators and adapters with these optimizers.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'numpy' 2>/dev/null
"$folder/venv/bin/pip" install --quiet --no-deps 'pytorch_optimizer==4.1.0' 2>/dev/null
cat >"$folder/late.py" <<'PYTHON'
import importlib.metadata
import sys

import torch
from pytorch_optimizer import load_optimizer

torch.set_num_threads(1)
print("pytorch_optimizer", importlib.metadata.version("pytorch_optimizer"), "torch", torch.__version__)
RATE, STEPS = 1e-3, 20


def steps(make, start, group="shared"):
    """The first step and the largest of the first 20 of a parameter that joins at `start`, in learning rates."""
    early, late = (torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(2))
    optimizer = make({"shared": [early, late], "own": [{"params": [early]}, {"params": [late]}], "added": [early]}[group])
    sizes = []
    for step in range(start + STEPS):
        early.grad = torch.ones_like(early)
        late.grad = torch.ones_like(late) if step >= start else None
        if step == start and group == "added":
            optimizer.add_param_group({"params": [late]})
        before = late.detach().clone()
        optimizer.step()
        if step >= start:
            sizes.append((late - before).abs().mean().item() / RATE)
    return sizes[0], max(sizes)


NAMES = ("laprop", "adabelief", "adamp", "yogi", "apollo", "ademamix", "galore", "flashadamw", "adan", "stableadamw")
measured = {}
for name in ("torch AdamW", *NAMES):
    optimizer = torch.optim.AdamW if name == "torch AdamW" else load_optimizer(name)

    def make(parameters):
        return optimizer(parameters, lr=RATE, weight_decay=0.0)

    cases = ((0, "shared"), (1000, "shared"), (1000, "own"), (1000, "added"))
    measured[name] = [steps(make, start, group) for start, group in cases]
    texts = [f"{first:5.2f} and {largest:5.2f}" for first, largest in measured[name]]
    print(
        f"{name:<12} first and largest step from the beginning {texts[0]}; after 1000 steps {texts[1]}, in a group of its own "
        f"{texts[2]}, in a group added then {texts[3]}"
    )
ok = [all(abs(size - 1) < 0.01 for pair in measured["torch AdamW"] for size in pair)]
ok += [measured["laprop"][1][0] > 20, measured["adabelief"][1][1] > 8]
ok += [measured[name][1][0] > 2 and measured[name][1][1] > 4.5 for name in NAMES[2:8]]
ok += [measured[name][1][0] < 0.3 for name in NAMES[8:]]
ok += [measured[name][0] == measured[name][3] and measured[name][1] == measured[name][2] for name in NAMES]
ok += [abs(measured[name][0][0] - 1) < 0.15 for name in NAMES]
sys.exit(0 if all(ok) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/late.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
