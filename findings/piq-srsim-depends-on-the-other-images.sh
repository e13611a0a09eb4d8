#!/usr/bin/env bash
# piq, srsim and SRSIMLoss (SR-SIM, a similarity of images by spectral saliency) of a batch: the score of a pair depends on
# which other pairs are in the batch. The same blurred copy of an image scores 0.83 alone, 0.91 in a batch with a grey picture
# and 0.95 with a drawing, the difference between a blur of 9 pixels and one of 6. An image compared with itself, which is 1
# alone, gets 0.91 in a batch with its blurred copy. reduction="none", which promises a score for each pair, gives these.
# The saliency map is stretched to 0 to 1 by its minimum and maximum; both are taken over the whole batch, not over each image,
# and over the predictions and the targets separately, so that two equal images are stretched differently.
# The documentation: "Compute Spectral Residual based Similarity for a batch of images", "Reduction over samples in batch". The
# other metrics of the library (SSIM, FSIM, VSI, HaarPSI, GMSD, MDSI, DSS, VIF) give the mean of the single scores, and a reader
# expects it here. It hurts whoever compares models by it: shuffling the test set, the batch size, a short last batch or the
# number of devices changes the result, and as a loss it couples the gradient of one image with the contents of the others.
# Right is one pair at a time. Here with piq 0.8.0. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'torchvision==0.28.0' 'piq==0.8.0' 'scipy==1.17.1' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/similarity.py" <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
import torch
from scipy import ndimage

try:
    import piq
except RuntimeError:  # beside a torch for CPUs torchvision finds its operators missing; none is used here
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    import piq

print("piq", importlib.metadata.version("piq"), "torch", torch.__version__)
rng = np.random.default_rng(0)
clouds = ndimage.gaussian_filter(rng.random((3, 256, 256)), (0, 3, 3))
clouds = torch.tensor((clouds - clouds.min()) / np.ptp(clouds), dtype=torch.float32)[None]


def blurred(width):
    return torch.nn.functional.avg_pool2d(clouds, width, 1, width // 2)


copy = blurred(9)
grey = torch.full_like(clouds, 0.5)
drawing = torch.ones_like(clouds)
drawing[..., 40:44, 30:200] = 0
low = 0.5 + 0.02 * (clouds.flip(-1) - 0.5)


def beside(metric, other):
    """Score of the copy in a batch with another image, which is compared with itself, and the score of that."""
    scores = metric(torch.cat([copy, other]), torch.cat([clouds, other]), reduction="none")
    return scores[0].item(), scores[1].item()


alone = piq.srsim(copy, clouds).item()
equal = piq.srsim(clouds, clouds).item()
print(f"SR-SIM of a blurred copy, alone: {alone:.4f}; of the image and itself: {equal:.4f}")
found = {}
for name, other in (("grey", grey), ("drawing", drawing), ("low contrast", low), ("the image", clouds)):
    found[name] = beside(piq.srsim, other)
    print(f"in a batch with {name:<14} {found[name][0]:.4f}; {name} and itself: {found[name][1]:.4f}")
widths = {width: piq.srsim(blurred(width), clouds).item() for width in (3, 5, 7, 9, 11)}
print("alone, by the width of the blur:", *(f"{width}: {each:.4f}" for width, each in widths.items()))
largest = 0
for metric in (piq.ssim, piq.fsim, piq.vsi, piq.haarpsi, piq.gmsd, piq.mdsi, piq.dss, piq.vif_p):
    single = metric(copy, clouds).item()
    largest = max(largest, *(abs(beside(metric, other)[0] - single) for other in (grey, drawing, low, clouds)))
print(f"the other metrics differ by at most {largest:.0e}")
scores = [each[0] for each in found.values()]
as_found = max(scores) - alone > 0.1 and found["the image"][1] < 0.95 and abs(equal - 1) < 1e-5
sys.exit(0 if as_found and largest < 1e-4 else 1)
PYTHON
"$folder/venv/bin/python" "$folder/similarity.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
