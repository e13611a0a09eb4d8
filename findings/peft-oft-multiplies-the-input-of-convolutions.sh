#!/usr/bin/env bash
# peft, OFT on a Conv2d with a kernel larger than 1 x 1: an adapter just made, whose rotation is the identity, changes the model.
# The input of a 3 x 3 convolution is multiplied by 9, of a 5 x 5 by 25, and by less towards the border, down to 1 in the corner.
# merge_and_unload() gives another model: of a new adapter the original one, of a trained one an output that differs by as much
# as the adapter does.
# The layer rotates overlapping patches of the input and puts them back by a sum, so that each pixel counts as often as a patch
# holds it; the convolution then makes its own patches of that. Merging rotates the kernel, which is the method as published.
# The documentation: OFT preserves the pairwise angles of neurons, keeps what the model knows, and merges into the weights. A reader
# expects that a new adapter leaves the model as it is, as with the other methods, and that merging changes nothing.
# Whoever adapts a U-Net or an autoencoder starts from a broken one, trains the adapter to repair it, and deploys yet another.
# Linear layers and 1 x 1 convolutions are right; so are LoRA, BOFT and HRA on the same convolution. Merging a new adapter and
# comparing the outputs shows it. Here with peft 0.21.2. Exits 0 while that is so.
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


def outputs(layer, config, x, trained):
    """Output of the layer, with the adapter beside it, and with the adapter merged."""
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config).eval()
    with torch.no_grad():
        if trained:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        adapted = model(x)
        return layer(x), adapted, model.merge_and_unload()(x)


def compare(name, layer, config, x=IMAGE):
    """Whether a new adapter changes nothing, and whether merging a trained one changes nothing."""
    with torch.no_grad():
        original, new, _ = outputs(layer, config, x, trained=False)
        _, adapted, merged = outputs(layer, config, x, trained=True)
    size = original.abs().max()
    change = ((new - original).abs().max() / size).item()
    effect = ((adapted - original).abs().max() / size).item()
    error = ((adapted - merged).abs().max() / size).item()
    print(f"{name:<18} a new adapter changes {change:7.1%}; a trained one {effect:7.1%}, and merging it {error:7.1%}, expected 0")
    return change, error


def oft(block):
    return peft.OFTConfig(target_modules=["0"], oft_block_size=block)


wrong = [
    compare(f"OFT, {size} x {size}, / {stride}", nn.Conv2d(8, 16, size, stride=stride, padding=size // 2, bias=False), oft(8))
    for size, stride in ((3, 1), (3, 2), (5, 1))
]
convolution = nn.Conv2d(8, 16, 3, padding=1, bias=False)
right = [
    compare("OFT, 1 x 1", nn.Conv2d(8, 16, 1), oft(8)),
    compare("OFT, linear", nn.Linear(16, 16), oft(8), IMAGE.flatten(2).mT[..., :8].repeat(1, 1, 2)),
    compare("LoRA, 3 x 3", convolution, peft.LoraConfig(target_modules=["0"], r=4)),
    compare("BOFT, 3 x 3", convolution, peft.BOFTConfig(target_modules=["0"], boft_block_size=4)),
    compare("HRA, 3 x 3", convolution, peft.HRAConfig(target_modules=["0"], r=4)),
]

taps = nn.Conv2d(8, 8, 3, padding=1, bias=False)  # returns its input
with torch.no_grad():
    taps.weight.zero_()
    for channel in range(8):
        taps.weight[channel, channel, 1, 1] = 1
_, new, merged = outputs(taps, oft(8), torch.ones(1, 8, 8, 8), trained=False)
rows = new[0, 0].round().int().tolist()
print("a 3 x 3 convolution that returns its input, of an image of ones, with a new OFT adapter; merged: all", merged.mean().item())
print(*(" ".join(map(str, row)) for row in rows), sep="\n")
as_found = rows[0][0] == 1 and rows[4][4] == 9 and torch.equal(merged, torch.ones_like(merged))
ok = all(min(pair) > 0.5 for pair in wrong) and all(max(pair) < 1e-4 for pair in right)
sys.exit(0 if as_found and ok else 1)
PYTHON
"$folder/venv/bin/python" "$folder/adapter.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
