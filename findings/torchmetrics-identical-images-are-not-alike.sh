#!/usr/bin/env bash
# torchmetrics, UniversalImageQualityIndex and SpatialCorrelationCoefficient of an image and itself: not 1 but the share of the
# image that is not of one colour. A picture whose upper third is plain white gets 0.74 and 0.71 for itself, a drawing on white paper
# 0.27 and 0.22, hardly more than compared with a copy that has grain (0.26 and 0.22), a plain image 0 and 0. SpectralAngleMapper
# is NaN for the whole set if one pixel of it is black.
# In a window of one colour variances are 0 and the quotients 0 / 0 (or, for 0.8, two rounding errors): the first two take it
# for "nothing alike", the third leaves the NaN in the mean. SSIM, which differs from the first by small constants, is 1.
# The documentation of the index refers to its paper, where it is 1 exactly if the images are equal. It hurts whoever measures
# reconstructions of drawings, text, renderings, masks or padded images: how much is plain decides, not how good the model is,
# and a model that adds grain to paper loses nothing.
# Right is SSIM with a data range. Here with torchmetrics 1.9.0. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'torchmetrics==1.9.0' 2>/dev/null
cat >"$folder/alike.py" <<'PYTHON'
import sys

import torch
import torchmetrics
from torchmetrics.functional.image import spatial_correlation_coefficient, spectral_angle_mapper
from torchmetrics.functional.image import structural_similarity_index_measure, universal_image_quality_index

print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__)
generator = torch.Generator().manual_seed(0)


def noise(deviation):
    return deviation * torch.randn(2, 3, 96, 96, generator=generator)


def row(name, *images):
    first = universal_image_quality_index(*images).item()
    second = spatial_correlation_coefficient(*images).item()
    angle = spectral_angle_mapper(*images).item()
    ssim = structural_similarity_index_measure(*images, data_range=1.0).item()
    print(f"{name:<48} UQI {first:6.3f}  SCC {second:6.3f}  SSIM {ssim:6.3f}  spectral angle {angle:.4f}")
    return first, second, ssim, angle


photo = (0.5 + noise(0.15)).clamp(0.05, 1)
sky, paper = photo.clone(), torch.full_like(photo, 1.0)
sky[:, :, :32] = 1.0
paper[:, :, 40:56, 20:76] = 0.0
paper[:, :, 46:50] = 0.25
grain = (paper + noise(0.02)).clamp(0.01, 1)
black = photo.clone()
black[0, :, 0, 0] = 0

whole = row("a photo and itself", photo, photo)
third = row("its upper third of one colour, and itself", sky, sky)
plain = row("an image of one colour and itself", torch.ones_like(photo), torch.ones_like(photo))
drawing = row("a drawing on white and itself", paper, paper)
row("the drawing and a copy with grain", grain, paper)
row("the grained copy and itself", grain, grain)
pixel = row("one black pixel in two images, and itself", black, black)
ok = [
    min(whole[:3]) > 0.999 and min(third[2], plain[2], drawing[2]) > 0.999,
    0.6 < third[0] < 0.85 and 0.6 < third[1] < 0.85,
    plain[0] < 0.01 and plain[1] < 0.01,
    drawing[0] < 0.6 and drawing[1] < 0.6,
    pixel[3] != pixel[3] and pixel[0] > 0.99,
]
sys.exit(0 if all(ok) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/alike.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
