#!/usr/bin/env bash
# LyCORIS, LoHa: merging an adapter into the weights (merge_to) gives another model than the adapter itself. What it adds is
# multiplied by alpha / dim a second time: at dim 8 and alpha 1 the merged model has an eighth of what was trained; at dim 4 and
# alpha 16 it has four times as much. Only where alpha equals dim are both the same.
# The product of the four factors is computed with alpha / dim in it, and the function for the difference of the weights, which
# merging calls, multiplies by alpha / dim again; the forward pass does not. So it is for linear layers and convolutions, with the
# Tucker decomposition and without; onfly_merge() and lycoris.utils.merge, for whole checkpoints, call the same function.
# The README: "You can merge your LyCORIS model back to your checkpoint". A reader expects the same outputs; LoRA and LoKr give
# them. It hurts whoever trains a LoHa with an alpha below dim, judges it by samples drawn during training, and distributes a
# merged checkpoint: it is the base model with a hint of the style. Nothing is raised, and a test with alpha equal to dim passes.
# Right is merging with a multiplier of dim / alpha. Here with lycoris-lora 4.1.3. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'lycoris-lora==4.1.3' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/merge.py" <<'PYTHON'
import copy
import importlib.metadata
import logging
import sys

import torch
from lycoris import LycorisNetwork, create_lycoris
from torch import nn

logging.disable(logging.INFO)
print("lycoris-lora", importlib.metadata.version("lycoris-lora"), "torch", torch.__version__)
LycorisNetwork.apply_preset({"target_module": ["Block"], "enable_conv": True})


class Block(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def measure(layer, x, algorithm, dim, alpha, **options):
    """What the merged adapter adds to the output, in units of what the adapter adds beside the layer, and the rest."""
    torch.manual_seed(1)
    model = Block(layer).double()
    original, merged = copy.deepcopy(model), copy.deepcopy(model)
    options = {"linear_dim": dim, "conv_dim": dim, "linear_alpha": alpha, "conv_alpha": alpha, "algo": algorithm, **options}

    def adapter(target):
        network = create_lycoris(target, 1.0, **options)
        network.apply_to()
        return network.double().eval()

    trained = adapter(model)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        beside = model(x) - original(x)
        into = adapter(merged)
        into.load_state_dict(trained.state_dict())
        into.restore()
        into.merge_to(1.0)
        change = merged(x) - original(x)
    factor = ((change * beside).sum() / beside.square().sum()).item()
    return factor, ((change - factor * beside).norm() / beside.norm()).item()


torch.manual_seed(0)
linear, vectors = nn.Linear(24, 36), torch.randn(4, 24).double()
convolution, images = nn.Conv2d(16, 24, 3, padding=1), torch.randn(2, 16, 9, 9).double()
ok = []
for dim, alpha in ((8, 8), (8, 4), (8, 1), (16, 1), (4, 16)):
    for name, layer, x, options in (
        ("linear", linear, vectors, {}),
        ("3 x 3", convolution, images, {}),
        ("3 x 3, Tucker", convolution, images, {"use_tucker": True}),
    ):
        factor, rest = measure(layer, x, "loha", dim, alpha, **options)
        print(f"LoHa, dim {dim:>2}, alpha {alpha:>2}, {name:<14} merged adds {factor:.4f} of the adapter; alpha / dim {alpha / dim:.4f}")
        ok.append(abs(factor - alpha / dim) < 1e-6 and rest < 1e-6)
for algorithm in ("lora", "lokr"):
    factor, rest = measure(linear, vectors, algorithm, 8, 1)
    print(f"{algorithm}, dim 8, alpha 1: merged adds {factor:.4f}")
    ok.append(abs(factor - 1) < 1e-6 and rest < 1e-6)
sys.exit(0 if all(ok) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/merge.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
