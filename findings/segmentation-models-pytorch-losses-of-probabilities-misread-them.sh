#!/usr/bin/env bash
# segmentation-models-pytorch, losses with from_logits=False: FocalLoss with several classes and LovaszLoss in every mode do not
# take the probabilities for what they are. A perfect prediction has a focal loss of 0.035 and a Lovasz loss of 0.60 (several
# classes), 0.86 (binary) and 0.80 (multilabel), where both losses are zero for the logits of the same prediction.
# FocalLoss takes log p for a logit, and the sigmoid of that is p / (1 + p): a pixel that is surely right counts as right by a
# half. So the loss no longer focuses. Of 1000 pixels with p = 0.99 and ten with p = 0.1, the easy ones give 23% of the gradient;
# with the focal loss of the paper it is 0.03%. LovaszLoss never reads the argument: it takes the softmax of the probabilities
# again, or the hinge of them, whose margin of 1 no background pixel can keep.
# DiceLoss, JaccardLoss and TverskyLoss of the package, and FocalLoss with independent classes, are the same for logits and for
# their probabilities. The documentation of FocalLoss: "from_logits: If True, assumes input is raw logits"; LovaszLoss has it in
# its signature. A reader whose model ends in a softmax or sigmoid expects the loss that the logits would have.
# The losses fall in training and are the smallest for the right classes; only a floor and another weighting remain.
# Right are logits. Here with segmentation-models-pytorch 0.6.0. Exits 0 while that is so.
# Matters to: training of segmentation and of detectors with rare classes, comparisons of losses.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'numpy==2.4.6' 2>/dev/null
"$folder/venv/bin/pip" install --quiet --no-deps 'segmentation-models-pytorch==0.6.0' 2>/dev/null
cat >"$folder/probabilities.py" <<'PYTHON'
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

# The losses alone: the package as a whole imports torchvision, which does not load beside a torch for CPUs.
path = Path(importlib.util.find_spec("segmentation_models_pytorch").submodule_search_locations[0]) / "losses"
spec = importlib.util.spec_from_file_location("losses", path / "__init__.py", submodule_search_locations=[str(path)])
losses = importlib.util.module_from_spec(spec)
sys.modules["losses"] = losses
spec.loader.exec_module(losses)
torch.set_num_threads(1)
package = "segmentation-models-pytorch"
print(package, importlib.metadata.version(package), "torch", torch.__version__)
torch.manual_seed(0)
CLASSES = 5
LOGITS, LABELS = 3 * torch.randn(2, CLASSES, 16, 16), torch.randint(CLASSES, (2, 16, 16))
MASKS = F.one_hot(LABELS, CLASSES).movedim(-1, 1)


def compare(name, mode):
    """The loss of logits and of their probabilities, for a random and for a perfect prediction."""
    channels = 1 if mode == "binary" else CLASSES
    target = LABELS if mode == "multiclass" else MASKS[:, :channels]
    values = []
    for logits in (LOGITS[:, :channels], 80.0 * MASKS[:, :channels] - 40):
        probabilities = logits.softmax(1) if mode == "multiclass" else logits.sigmoid()
        values += [getattr(losses, name)(mode)(logits, target), getattr(losses, name)(mode, from_logits=False)(probabilities, target)]
    values = [value.item() for value in values]
    print(f"  {name:<12} {mode:<10} random {values[0]:.3f} and {values[1]:.3f}, perfect {values[2]:.3f} and {values[3]:.3f}")
    return values


def easy_share(criterion, easy=1000, hard=10):
    """Share of the gradient, with respect to logits, of the pixels that are right already."""
    right = torch.tensor([0.99] * easy + [0.1] * hard)
    logits = torch.stack([right, 1 - right])[None].log().requires_grad_()  # (1, 2, pixels)
    criterion(logits, torch.zeros(1, easy + hard, dtype=torch.long)).backward()
    size = logits.grad[0, 0].abs()
    return (size[:easy].sum() / size.sum()).item()


def paper(logits, labels, gamma=2.0):
    entropy = F.cross_entropy(logits, labels, reduction="none")
    return ((1 - (-entropy).exp()) ** gamma * entropy).mean()


ok = []
print("loss of the logits and, with from_logits=False, of their probabilities")
for name in ("DiceLoss", "JaccardLoss", "TverskyLoss", "FocalLoss", "LovaszLoss"):
    for mode in ("binary", "multilabel", "multiclass"):
        logits, probabilities, perfect_logits, perfect = compare(name, mode)
        broken = name == "LovaszLoss" or (name, mode) == ("FocalLoss", "multiclass")
        ok.append(perfect_logits < 1e-4)
        if broken:
            ok += [abs(logits - probabilities) > 0.05, perfect > (0.5 if name == "LovaszLoss" else 0.03)]
        else:
            ok += [abs(logits - probabilities) < 1e-3, perfect < 1e-3]
focal = losses.FocalLoss("multiclass", from_logits=False)
shares = [easy_share(lambda logits, labels: focal(logits.softmax(1), labels)), easy_share(paper)]
print(f"share of 1000 easy pixels in the gradient, beside 10 hard ones: FocalLoss {shares[0]:.2%}, the paper's {shares[1]:.2%}")
ok += [shares[0] > 0.1, shares[1] < 0.01]
sigmoid = torch.tensor([1.0, 0.9, 0.5]).log().sigmoid()
print("p of 1, 0.9 and 0.5 count as", [round(value, 3) for value in sigmoid.tolist()])
sys.exit(0 if all(ok) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/probabilities.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
