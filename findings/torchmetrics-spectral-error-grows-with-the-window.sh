#!/usr/bin/env bash
# torchmetrics, RelativeAverageSpectralError (RASE): the result is too large by the square of the window, 64 times at the
# default of 8. An image with an error of 10 % of its mean brightness has a RASE of 640 % instead of 10 %, and of 1920 % for a
# window of 14: the measure, meant to be a per cent of the mean, grows with the area over which it averages.
# RASE is 100 / mean * root of the mean squared error over the bands. The mean is taken from a filter that is an average already
# and divided by the area of the window once more. The documentation gives no other definition: it refers to the papers, where
# pan-sharpened images have values of a few per cent. sewar, another implementation, gives 9.9 % for the same images.
# Two models compared with one window are in the right order. It hurts whoever compares with published values, or reads the
# number as what it is named: a relative error.
# Right is the result divided by window_size ** 2, or ErrorRelativeGlobalDimensionlessSynthesis (ERGAS), which is the same
# per cent with ratio=1 for bands of equal brightness. Here with torchmetrics 1.9.0 and sewar 0.4.10. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'torch==2.13.0' 'torchmetrics==1.9.0' 'sewar==0.4.10' 2>/dev/null
cat >"$folder/rase.py" <<'PYTHON'
import importlib.metadata
import sys

import sewar
import torch
import torchmetrics
from torchmetrics.functional.image import error_relative_global_dimensionless_synthesis as ergas
from torchmetrics.functional.image import relative_average_spectral_error as rase

print("torchmetrics", torchmetrics.__version__, "sewar", importlib.metadata.version("sewar"))
generator = torch.Generator().manual_seed(0)
ok = []
for bands in (1, 4):
    image = 0.5 + 0.01 * torch.randn(2, bands, 64, 64, generator=generator)
    noisy = image + 0.05 * torch.randn(image.shape, generator=generator)
    exact = (100 / image.mean() * (noisy - image).square().mean().sqrt()).item()
    print(f"{bands} bands, mean {image.mean():.2f}, error {(noisy - image).std():.3f}: RASE should be {exact:.1f} per cent")
    print(f"  ERGAS with ratio 1: {ergas(noisy, image, ratio=1).item():.1f}")
    ok.append(abs(ergas(noisy, image, ratio=1).item() / exact - 1) < 0.05)
    for window in (4, 8, 14):
        value = rase(noisy, image, window_size=window).item()
        print(f"  window {window:>2}: {value:7.1f}, {value / exact:.0f} times as much; divided by {window**2}: {value / window**2:.1f}")
        ok.append(abs(value / exact / window**2 - 1) < 0.05)
    one, other = image[0].permute(1, 2, 0).numpy(), noisy[0].permute(1, 2, 0).numpy()
    if bands > 1:
        theirs = float(sewar.rase(one, other, ws=8))
        print(f"  sewar, window  8: {theirs:7.1f}")
        ok.append(abs(theirs / exact - 1) < 0.1)
sys.exit(0 if all(ok) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/rase.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
