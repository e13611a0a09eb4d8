#!/usr/bin/env bash
# torchmetrics on uint8 images: of a copy with a little noise MeanAbsoluteError is 102 instead of 1.6, ExplainedVariance 0.31
# instead of 0.999, R2Score above its maximum of 1, LogCoshError infinite; TotalVariation is twice the right one. MeanSquaredError is
# right up to differences of 15 and then too small, 86 instead of 271. PeakSignalNoiseRatio, which is computed from the same squared
# error, is right on the same images.
# The differences are taken in the dtype of the images, where 3 - 5 is 254; some metrics convert to float first, some do not.
# A reader who decodes images, gets uint8, and sees PSNR and MSE side by side in one MetricCollection expects both to be of
# the same error, or an exception, as SSIM and UniversalImageQualityIndex raise one for uint8. The documentation says
# "preds: predictions from model" and names no dtype. The wrong squared error is of a plausible size and grows
# no further, so that a bad model looks like a fair one; half of the small differences wrap to 255.
# Right is to convert to float before update(). Here with torchmetrics 1.9.0. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'torchmetrics==1.9.0' 2>/dev/null
cat >"$folder/wrap.py" <<'PYTHON'
import sys

import torch
import torchmetrics
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure, TotalVariation

print("torchmetrics", torchmetrics.__version__, "torch", torch.__version__)
generator = torch.Generator().manual_seed(0)
image = torch.randint(30, 220, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)


def noisy(deviation):
    """The image with noise, in uint8, without a value that is clipped."""
    noise = (deviation * torch.randn(image.shape, generator=generator)).round().clamp(-30, 30)
    return (image + noise).to(torch.uint8)


def score(metric, *images):
    metric.update(*(one if isinstance(metric, (PeakSignalNoiseRatio, TotalVariation)) else one.flatten() for one in images))
    return metric.compute().item()


def compare(make, *images):
    """The score of uint8 and of float images."""
    bytes_, floats = score(make(), *images), score(make(), *(one.float() for one in images))
    print(f"  {type(make()).__name__:<34} uint8 {bytes_:14.4f}   float {floats:14.4f}")
    return abs(bytes_ - floats) > 0.03 * abs(floats)


wrong, right, squared, absolute = [], [], [], []
for deviation in (18, 2):
    print(f"noise with a standard deviation of {deviation}")
    other = noisy(deviation)
    pair = other, image
    wrong += [
        compare(make, *pair)
        for make in (
            torchmetrics.MeanAbsoluteError,
            torchmetrics.ExplainedVariance,
            torchmetrics.RelativeSquaredError,
            torchmetrics.LogCoshError,
        )
    ]
    squared.append(compare(torchmetrics.MeanSquaredError, *pair))
    absolute.append(score(torchmetrics.MeanAbsoluteError(), *pair))
    compare(torchmetrics.R2Score, *pair)
    right.append(compare(lambda: PeakSignalNoiseRatio(data_range=255.0), *pair))
wrong.append(compare(TotalVariation, image))
print(f"mean absolute error in uint8, more noise and less noise: {absolute[0]:.0f} and {absolute[1]:.0f}")
above = score(torchmetrics.R2Score(), *pair) > 1
try:
    StructuralSimilarityIndexMeasure(data_range=255.0).update(*pair)
    raised = False
except RuntimeError as error:
    print("SSIM:", str(error).splitlines()[0])
    raised = True
sys.exit(0 if all(wrong) and not any(right) and above and raised and squared == [True, False] else 1)
PYTHON
"$folder/venv/bin/python" "$folder/wrap.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
