#!/usr/bin/env bash
# Augmax, ColorJitter: saturation is never changed, whatever its strength, and hue=0.4 with brightness=0 and contrast=0 changes
# nothing at all. ColorJitter(brightness=0.4, contrast=0, hue=0.4, p=1) changes the brightness alone. That the transformation is
# applied, and at all strengths above 0 the brightness, contrast and hue, is right.
# The new saturation is computed and not kept. And one random key is made for each strength above 0, but given out by the place in
# the list brightness, contrast, hue, saturation: strengths of 0 use up keys, and the list ends where the keys do. A probability
# below 1 adds a key, so that p=0.99 can jitter what p=1 does not.
# The documentation: "Randomly jitter the image colors", with one argument for each of the four, as torchvision's class of the
# name; inverting it is offered too. A reader expects each of them to work alone.
# It hurts whoever switches off what would destroy the meaning of an image and keeps the hue: the training runs without any
# augmentation of colours, and a comparison of strengths finds that they do not matter.
# Right is to leave no strength at 0 but small, 1e-6; for saturation there is no way. Here with augmax 0.4.1. Exits 0 while that
# is so.
# Matters to: whoever augments images on the device, as in self-supervised training, which depends on the jitter of colours.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'augmax==0.4.1' 2>/dev/null
cat >"$folder/jitter.py" <<'PYTHON'
import colorsys
import importlib.metadata
import sys

import augmax
import jax
import jax.numpy as jnp
import numpy as np

print("augmax", importlib.metadata.version("augmax"), "jax", jax.__version__)
PIXEL, IMAGES = (0.6, 0.4, 0.3), 200
image = jnp.broadcast_to(jnp.array(PIXEL, jnp.float32), (2, 2, 3))
before = np.array(colorsys.rgb_to_hsv(*PIXEL))
keys = jax.random.split(jax.random.key(0), IMAGES)


def spread(p=1.0, **strengths):
    """By how much hue, saturation and value of a pixel change at most, of all images."""
    strengths = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), strengths.pop("others", 0.0)) | strengths
    chain = augmax.Chain(augmax.ColorJitter(**strengths, p=p))
    pixels = np.asarray(jax.jit(jax.vmap(lambda key: chain(key, image)[0, 0]))(keys), float)
    change = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in pixels]) - before
    change[:, 0] = (change[:, 0] + 0.5) % 1 - 0.5
    return np.abs(change).max(0)


CASES = (
    ({"brightness": 0.4}, 1.0, (False, False, True)),
    ({"contrast": 0.4}, 1.0, (False, False, False)),
    ({"hue": 0.4}, 1.0, (False, False, False)),
    ({"saturation": 0.9}, 1.0, (False, False, False)),
    ({"hue": 0.4, "saturation": 0.9}, 1.0, (False, False, False)),
    ({"hue": 0.4, "saturation": 0.9}, 0.99, (True, False, False)),
    ({"brightness": 0.4, "hue": 0.4}, 1.0, (False, False, True)),
    ({"brightness": 0.4, "contrast": 0.4, "saturation": 0.9, "hue": 0.4}, 1.0, (True, False, True)),
    ({"hue": 0.4, "others": 1e-6}, 1.0, (True, False, False)),
    ({"saturation": 0.9, "others": 1e-6}, 1.0, (False, False, False)),
)
ok = []
print("the largest change of hue, saturation and value in 200 images")
for strengths, p, expected in CASES:
    change = spread(p, **strengths)
    text = ", ".join(f"{name}={value}" for name, value in strengths.items())
    print(f"  {text}, p={p}: {change[0]:.2f}, {change[1]:.2f}, {change[2]:.2f}")
    ok.append(tuple((change > 0.05).tolist()) == expected and not ((0.001 < change) & (change < 0.05)).any())
sys.exit(0 if all(ok) else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/jitter.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
