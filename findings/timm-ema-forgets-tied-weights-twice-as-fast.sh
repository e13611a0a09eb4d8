#!/usr/bin/env bash
# timm, ModelEmaV3 and ModelEmaV2 of a model with tied weights, as an embedding and the output layer of a decoder: the average of
# the tied weights is updated twice in each step, with decay ** 2 in effect, while all others are updated once. It lies half as
# far back: at decay 0.99 by 49 steps instead of 99, at 0.9999 by 5,000 instead of 10,000. The averaged model joins an embedding
# of one time with layers of another, and its embedding is averaged over half as many steps.
# Both walk through the values of state_dict(), in which a tied weight is listed under each of its names, and average in place.
# The documentation: "Keep a moving average of everything in the model state_dict (parameters and buffers)", with one decay. A
# reader expects an average that does not depend on whether two layers share a tensor, as with torch's AveragedModel, which walks
# through parameters(). It hurts whoever averages a captioner, a multimodal or a language model: the numbers stay plausible, the
# tie is kept, and a model without ties shows nothing.
# Right is exclude_buffers=True, where buffers are copied; it walks through parameters(). Here with timm 1.0.31. Exits 0 while that
# is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'numpy==2.4.6' 'pyyaml' 'huggingface_hub' 'safetensors' 2>/dev/null
"$folder/venv/bin/pip" install --quiet --no-deps 'timm==1.0.31' 2>/dev/null
cat >"$folder/average.py" <<'PYTHON'
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

# The module alone: the package as a whole imports torchvision, which does not load beside a torch for CPUs.
path = Path(importlib.util.find_spec("timm").submodule_search_locations[0]) / "utils" / "model_ema.py"
spec = importlib.util.spec_from_file_location("model_ema", path)
model_ema = importlib.util.module_from_spec(spec)
spec.loader.exec_module(model_ema)
print("timm", importlib.metadata.version("timm"), "torch", torch.__version__)


class Decoder(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.layer = nn.Linear(4, 4)
        self.output = nn.Linear(4, 8, bias=False)
        if tied:
            self.output.weight = self.embedding.weight


def lags(make, tied, decay):
    """How many steps the averages of the embedding and of another layer lie behind weights that are equal to the step."""
    model = Decoder(tied).double()
    for parameter in model.parameters():
        parameter.data.zero_()
    average = make(model, decay)
    update = average.update_parameters if isinstance(average, AveragedModel) else average.update
    steps = int(20 / (1 - decay))
    for step in range(1, steps + 1):
        for parameter in model.parameters():
            parameter.data.fill_(step)
        update(model)
    assert (average.module.output.weight is average.module.embedding.weight) == tied
    return [steps - layer.weight[0, 0].item() for layer in (average.module.embedding, average.module.layer)]


MAKERS = {
    "ModelEmaV3": lambda model, decay: model_ema.ModelEmaV3(model, decay=decay),
    "ModelEmaV3(foreach=False)": lambda model, decay: model_ema.ModelEmaV3(model, decay=decay, foreach=False),
    "ModelEmaV3(exclude_buffers=True)": lambda model, decay: model_ema.ModelEmaV3(model, decay=decay, exclude_buffers=True),
    "ModelEmaV2": lambda model, decay: model_ema.ModelEmaV2(model, decay=decay),
    "torch AveragedModel": lambda model, decay: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)),
}
ok = []
for decay in (0.9, 0.99):
    expected, squared = (each / (1 - each) for each in (decay, decay**2))
    print(f"decay {decay}: the average lies {expected:.1f} steps back by definition, {squared:.1f} with the square of the decay")
    for name, make in MAKERS.items():
        (tied, other), untied = lags(make, True, decay), lags(make, False, decay)
        print(f"  {name:<33} tied {tied:.1f}, other layer {other:.1f}; without a tie {untied[0]:.1f}, {untied[1]:.1f}")
        right = name in ("ModelEmaV3(exclude_buffers=True)", "torch AveragedModel")
        ok.append(abs(tied - (expected if right else squared)) < 0.01)
        ok.append(max(abs(each - expected) for each in (other, *untied)) < 0.01)
sys.exit(0 if all(ok) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/average.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
