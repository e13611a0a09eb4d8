#!/usr/bin/env bash
# Keras 3, RandomSaturation on images of 0 to 255, its default value_range: where the saturation is raised, pixels become negative.
# (200, 100, 50) becomes (200, -100, -250) at factor 0.75, instead of (200, 67, 0). With factor=0.9, drawn from 0 to 0.9, random
# images reach -1071, with factor 1.0 -5965; on the same images of 0 to 1 with value_range=(0, 1) nothing leaves the range.
# The saturation of HSV lies between 0 and 1 whatever the range of the image. The scaled one is clipped to value_range instead,
# here to 0 to 255, and a saturation of 2 is a colour beyond the pure one. The range of the image is not taken into account else.
# The documentation: "value_range: the range of values the incoming images will have", "factor=1.0 makes the image fully saturated",
# with an example in 0 to 255 as float. A reader expects images in the range that was named, as RandomHue, RandomBrightness and
# RandomContrast give them, and the same pictures in both ranges.
# RandomColorJitter has it too; if it changes the hue as well, the hue is turned from wrong colours and then clipped. It hurts
# silently: float images of a pipeline are not looked at, some pixels of a batch are far outside of what the network has learned,
# the mean moves, and a display or a cast to uint8 clips or wraps them.
# Right is value_range=(0, 1) for images of 0 to 255: only the clip depends on it. Here with Keras 3.15.1. Exits 0 while that is
# so.
# Matters to: training of image models with Keras, on all backends.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'keras==3.15.1' 'jax==0.10.2' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/saturation.py" <<'PYTHON'
import colorsys
import sys

import jax
import keras
import numpy as np
from keras import layers

print("keras", keras.__version__, "backend", keras.backend.backend(), "jax", jax.__version__)
rng = np.random.default_rng(0)
images = rng.uniform(30, 220, (64, 16, 16, 3)).astype("float32")
pixel = np.array([200.0, 100.0, 50.0], "float32")


def run(layer, images):
    return np.asarray(layer(images, training=True))


def outside(images, high=255.0):
    return np.mean((images < -1e-3 * high) | (images > 1.001 * high))


ok = []
one = np.broadcast_to(pixel, (1, 2, 2, 3))
hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
for factor in (0.25, 0.5, 0.75):
    scale = factor / (1 - factor)
    exact = 255 * np.array(colorsys.hsv_to_rgb(hue, min(saturation * scale, 1.0), value))
    result = run(layers.RandomSaturation((factor, factor)), one)[0, 0, 0]
    clipped = run(layers.RandomSaturation((factor, factor), value_range=(0, 1)), one)[0, 0, 0]
    print(f"{pixel} at factor {factor}: {result.round(1)} instead of {exact.round(1)}; with value_range=(0, 1) {clipped.round(1)}")
    ok += [np.allclose(clipped, exact, atol=0.1), np.allclose(result, exact, atol=0.1) == (factor < 0.6)]
ok.append(result.min() < -200)
for factor in (0.6, 0.8, 0.9, 1.0):
    result = run(layers.RandomSaturation(factor, seed=0), images)
    scaled = run(layers.RandomSaturation(factor, value_range=(0, 1), seed=0), images / 255)
    clipped = run(layers.RandomSaturation(factor, value_range=(0, 1), seed=0), images)
    print(
        f"factor {factor}: images of 0 to 255 from {result.min():.0f} to {result.max():.0f}, {outside(result):.1%} of the values outside, "
        f"mean {result.mean():.0f}; of 0 to 1 from {scaled.min():.2f} to {scaled.max():.2f}, mean {255 * scaled.mean():.0f} / 255"
    )
    ok += [result.min() < -20, outside(result) > 0.001, outside(scaled, 1.0) == 0, np.allclose(clipped / 255, scaled, atol=1e-3)]
jitter = run(layers.RandomColorJitter(saturation_factor=(0.5, 0.9), seed=0), images)
print(f"RandomColorJitter(saturation_factor=(0.5, 0.9)): from {jitter.min():.0f} to {jitter.max():.0f}, {outside(jitter):.0%} outside")
ok.append(jitter.min() < -500)
for layer in (layers.RandomHue(0.9), layers.RandomBrightness(0.9), layers.RandomContrast(0.9)):
    result = run(layer, images)
    print(f"{type(layer).__name__}: from {result.min():.0f} to {result.max():.0f}")
    ok.append(outside(result) == 0)
sys.exit(0 if all(ok) else 1)
PYTHON
KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/saturation.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
