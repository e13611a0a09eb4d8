#!/usr/bin/env bash
# peft, LoRA on a Conv2d whose padding_mode is "reflect", "replicate" or "circular": the adapter pads with zeros. What it adds
# along the border is not what it adds inside, and merge_and_unload() gives another model than the one that was trained: inside
# the image both agree to seven digits, along the border they differ by a sixth of the largest output. A layer that wraps
# around, for textures without a seam or for panoramas, gets a seam from its adapter: shifting the image no longer shifts the
# output, and after merging it does. DoRA, LoHa and LoKr do the same. HRA and BOFT replace the whole convolution by
# one with zero padding: there an adapter just made, which should change nothing, already changes the border.
# The adapter's convolution takes kernel size, stride, padding and dilation from the layer, and not the padding mode; merging
# adds to the kernel of the layer, which keeps it. Everything with padding 0 or of mode "zeros" is right.
# The documentation: merging is "to eliminate latency", to have the adapter in the weights of the base model. A reader expects
# the same outputs. A comparison of their means, or of a tile from the middle, shows nothing; each further layer makes the
# border wider. Right is to pad before the layer, with padding=0 in it: torch.nn.ReflectionPad2d and a convolution. Here with
# peft 0.21.2. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'peft==0.21.2' 'transformers==5.24.0' 2>/dev/null
cat >"$folder/adapter.py" <<'PYTHON'
import copy
import sys

import peft
import torch
from torch import nn

print("peft", peft.__version__, "torch", torch.__version__)
torch.manual_seed(0)
IMAGE = torch.randn(2, 8, 16, 16)
TARGET = {"target_modules": ["1"]}


def convolution(mode):
    return nn.Sequential(nn.Identity(), nn.Conv2d(8, 8, 3, padding=1, padding_mode=mode))


def padded():
    return nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(8, 8, 3))


@torch.no_grad()
def compare(name, model, config):
    """Change by a new adapter, and difference of a trained one before and after merging, at the border and inside."""
    adapted = peft.get_peft_model(copy.deepcopy(model), config).eval()
    size = model(IMAGE).abs().max()
    new = ((adapted(IMAGE) - model(IMAGE)).abs().max() / size).item()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))
    before = adapted(IMAGE)
    shifted = adapted(IMAGE.roll(3, -1)).roll(-3, -1)
    merged = adapted.merge_and_unload()
    error = (merged(IMAGE) - before).abs() / size
    inside = error[..., 1:-1, 1:-1].max().item()
    error = error.max().item()
    seams = []
    if model[1].padding_mode == "circular":
        again = merged(IMAGE.roll(3, -1)).roll(-3, -1)
        seams = [((one - other).abs().max() / size).item() for one, other in ((shifted, before), (again, merged(IMAGE)))]
    seam = f"  a shifted image {seams[0]:6.1%}, merged {seams[1]:6.1%}" if seams else ""
    print(f"{name:<24} a new one changes {new:6.1%}; merging changes {error:6.1%}, inside {inside:.0e}{seam}")
    return new, error, inside, seams


lora = peft.LoraConfig(r=4, **TARGET)
modes = {mode: compare(f"LoRA, {mode}", convolution(mode), lora) for mode in ("reflect", "replicate", "circular")}
others = [
    compare(f"{name}, reflect", convolution("reflect"), config)
    for name, config in (
        ("DoRA", peft.LoraConfig(r=4, use_dora=True, **TARGET)),
        ("LoHa", peft.LoHaConfig(r=4, **TARGET)),
        ("LoKr", peft.LoKrConfig(r=4, **TARGET)),
    )
]
replaced = [
    compare(f"{name}, reflect", convolution("reflect"), config)
    for name, config in (("HRA", peft.HRAConfig(r=4, **TARGET)), ("BOFT", peft.BOFTConfig(boft_block_size=4, **TARGET)))
]
right = [compare("LoRA, zeros", convolution("zeros"), lora), compare("LoRA, ReflectionPad2d", padded(), lora)]
as_found = all(error > 0.01 and inside < 1e-5 for _, error, inside, _ in (*modes.values(), *others))
as_found &= all(new > 0.1 for new, *_ in replaced) and modes["circular"][3][0] > 0.05 and modes["circular"][3][1] < 1e-5
sys.exit(0 if as_found and all(max(new, error) < 1e-5 for new, error, *_ in right) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/adapter.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
