#!/usr/bin/env bash
# torchmetrics, BinaryAUROC and its relatives on logits: the score depends on how the same predictions are cut into batches. Of
# 1000 logits it is 0.864 in one batch, 0.847 in batches of two, 0.819 one by one; MulticlassAUROC of the same as two classes goes
# from 0.864 to 0.748. Average precision falls too, accuracy rises from 0.740 to 0.788. Nothing is raised or logged.
# Each update() decides for itself whether it got logits or probabilities: a batch with a value outside 0 to 1 is put through a
# sigmoid, one that happens to have none is taken as it is. A logit of 0.9 stays 0.9 in one batch and becomes 0.71 in another, and
# a ranking over both is no ranking any more; against the threshold 0.5, logits between 0 and 0.5 change sides.
# The documentation says that values outside 0 to 1 are "considered logits"; that an evaluation with a small batch, a
# last batch that is short, or one image at a time decides anew each time it does not. A reader expects the score of a set not
# to depend on its batches, as compute() collects all of them. It hurts small logits the most: a reward model or a judge at the
# beginning of training, where all logits are near 0, and comparisons of runs with different batch sizes.
# Right are probabilities: apply the sigmoid before update(). Here with torchmetrics 1.9.0. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'torchmetrics==1.9.0' 2>/dev/null
cat >"$folder/scores.py" <<'PYTHON'
import sys

import torch
import torchmetrics
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryAveragePrecision, BinaryF1Score, MulticlassAUROC

COUNT, SIZES = 1000, (1000, 100, 10, 4, 2, 1)
print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__)
generator = torch.Generator().manual_seed(0)
labels = torch.rand(COUNT, generator=generator) < 0.5
logits = 0.8 * torch.randn(COUNT, generator=generator) + 1.2 * labels - 0.1
one_of_two = torch.stack([0 * logits, logits], -1)
print(f"{COUNT} logits between {logits.min():.2f} and {logits.max():.2f}, in batches of", *SIZES)


def scores(name, metric, predictions):
    values = []
    for size in SIZES:
        metric.reset()
        for start in range(0, COUNT, size):
            metric.update(predictions[start : start + size], labels[start : start + size].long())
        values.append(metric.compute().item())
    print(f"{name:<40}", *(f"{value:.3f}" for value in values))
    return max(values) - min(values)


wrong, right = [], []
for metric in (BinaryAUROC(), BinaryAveragePrecision(), BinaryAccuracy(), BinaryF1Score()):
    name = type(metric).__name__
    wrong.append(scores(f"{name} of logits", metric, logits))
    right.append(scores(f"{name} of probabilities", metric, logits.sigmoid()))
wrong.append(scores("MulticlassAUROC of logits", MulticlassAUROC(2, validate_args=False), one_of_two))
right.append(scores("MulticlassAUROC of probabilities", MulticlassAUROC(2, validate_args=False), one_of_two.softmax(-1)))

ranks = logits.argsort().argsort().double()  # of all pairs of a positive and a negative, the share in the right order
positives = labels.sum().double()
exact = (ranks[labels].sum() - positives * (positives - 1) / 2) / (positives * (COUNT - positives))
print(f"share of pairs in the right order, which the area under the curve is: {exact:.3f}")
sys.exit(0 if min(wrong) > 0.01 and max(right) < 1e-6 else 1)
PYTHON
"$folder/venv/bin/python" "$folder/scores.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
