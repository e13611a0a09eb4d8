#!/usr/bin/env bash
# piq, srsim and SRSIMLoss (SR-SIM, a similarity of images by spectral saliency) of a batch: the score of a pair depends on which other
# pairs are in the batch. The same reconstruction of the same image scores 0.853 alone, 0.845 beside a grey picture and 0.882 beside a
# drawing, a range as large as that between noise of 0.08 and of 0.11. An image compared with itself, which is 1 by definition,
# gets 0.997 beside the reconstruction. reduction="none", which promises a score for every pair, gives these.
# The saliency map is stretched to 0 to 1 by its minimum and maximum; both are taken over the whole batch, not over each image, and
# over the predictions and the targets separately, so that two equal images are stretched differently.
# The documentation: "Compute Spectral Residual based Similarity for a batch of images", "Reduction over samples in batch". The other
# metrics of the library (SSIM, FSIM, VSI, HaarPSI, GMSD, MDSI, DSS, VIF) give the mean of the single scores, and a reader expects it here.
# It hurts whoever compares models by it: shuffling the test set, the batch size, a short last batch or the number of devices changes
# the result, and as a loss it couples the gradient of one image with the contents of the others.
# Right is one pair at a time. Here with piq 0.8.0. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'piq==0.8.0' 'scipy==1.17.1' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/similarity.py" <<'PYTHON'
import importlib.metadata
import sys

import numpy as np
import piq
import torch
from scipy import ndimage

print("piq", importlib.metadata.version("piq"), "torch", torch.__version__)
rng = np.random.default_rng(0)
clouds = ndimage.gaussian_filter(rng.random((3, 256, 256)), (0, 3, 3))
clouds = torch.tensor((clouds - clouds.min()) / np.ptp(clouds), dtype=torch.float32)[None]
noise = torch.tensor(rng.normal(size=(1, 3, 256, 256)), dtype=torch.float32)
copy = (clouds + 0.1 * noise).clamp(0, 1)
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
print(f"SR-SIM of a noisy copy, alone: {alone:.4f}; of the image and itself: {equal:.4f}")
found = {}
for name, other in (("grey", grey), ("drawing", drawing), ("low contrast", low), ("the image", clouds)):
    found[name] = beside(piq.srsim, other)
    print(f"in a batch with {name:<14} {found[name][0]:.4f}; {name} and itself: {found[name][1]:.4f}")
levels = {level: piq.srsim((clouds + level * noise).clamp(0, 1), clouds).item() for level in (0.08, 0.09, 0.1, 0.11, 0.12)}
print("alone, by the level of noise:", *(f"{level}: {each:.4f}" for level, each in levels.items()))
largest = 0
for metric in (piq.ssim, piq.fsim, piq.vsi, piq.haarpsi, piq.gmsd, piq.mdsi, piq.dss, piq.vif_p):
    single = metric(copy, clouds).item()
    largest = max(largest, *(abs(beside(metric, other)[0] - single) for other in (grey, drawing, low, clouds)))
print(f"the other metrics differ by at most {largest:.0e}")
scores = [each[0] for each in found.values()]
as_found = max(scores) - min(scores) > 0.02 and found["the image"][1] < 0.999 and abs(equal - 1) < 1e-5
sys.exit(0 if as_found and largest < 1e-4 else 1)
PYTHON
"$folder/venv/bin/python" "$folder/similarity.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
