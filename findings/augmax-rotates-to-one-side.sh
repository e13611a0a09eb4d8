#!/usr/bin/env bash
# Augmax, Rotate with a probability: Rotate((-30, 30), p=0.5) turns images by 0 to 30 degrees and never by -30 to 0. At p=0.25 it is
# 15 to 30 degrees, so that no small angle is left, at p=0.75 -15 to 30. Only p=1 has the whole range.
# Whether and how far to rotate are drawn with the same key. jax.random.bernoulli compares a uniform number with p, and uniform
# gives that very number: the rotation is applied where the number is below p, which is the lower part of the range of the angle.
# The documentation: "angle_range: Tuple of (min_angle, max_angle) to sample from", "p: Probability of applying the transformation".
# A reader expects an angle that does not depend on the probability, here with a mean of zero. How often it is applied is right.
# A network that is trained so has seen half of the rotations it is meant to stand, and masks and keypoints follow the image, so
# that nothing looks wrong; the mean angle of a set is 7.5 degrees. A distribution that leans is what augmentation is to prevent.
# Right is p=1, or a range of which the lower part is the one that is meant: (-30, -30 + 60 / p). Here with augmax 0.4.1. Exits 0
# while that is so.
# Matters to: whoever augments images on the device, for generators as for perception.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'augmax==0.4.1' 2>/dev/null
cat >"$folder/rotate.py" <<'PYTHON'
import importlib.metadata
import sys

import augmax
import jax
import jax.numpy as jnp
import numpy as np

print("augmax", importlib.metadata.version("augmax"), "jax", jax.__version__)
LIMIT, IMAGES, SIZE = 30.0, 4000, 33
image, centre = jnp.ones((SIZE, SIZE, 1)), (SIZE - 1) / 2
types = [augmax.InputType.IMAGE, augmax.InputType.KEYPOINTS]


def angles(*transformations):
    """The angles in degrees by which the images are turned, from where a keypoint goes."""
    chain = augmax.Chain(*transformations, input_types=types)
    point = jnp.array([[centre, centre + 10.0]])
    keys = jax.random.split(jax.random.key(0), IMAGES)
    moved = np.asarray(jax.jit(jax.vmap(lambda key: chain(key, [image, point])[1]))(keys))[:, 0] - centre
    return np.degrees(np.arctan2(moved[:, 0], moved[:, 1]))


ok = []
for p in (0.1, 0.25, 0.5, 0.75, 1.0):
    turned = angles(augmax.Rotate((-LIMIT, LIMIT), p=p))
    applied = turned[np.abs(turned) > 1e-3]
    low, high = applied.min(), applied.max()
    print(
        f"p={p}: {applied.size / IMAGES:.0%} are turned, by {low:.1f} to {high:.1f} degrees instead of -30 to 30, "
        f"mean {applied.mean():.1f}, mean of all {turned.mean():.1f}"
    )
    ok += [abs(applied.size / IMAGES - p) < 0.03, abs(low - (LIMIT - 2 * LIMIT * p)) < 1, abs(high - LIMIT) < 1]
for p in (0.25, 0.5, 0.75):
    turned = angles(augmax.Rotate((-LIMIT, -LIMIT + 2 * LIMIT / p), p=p))
    print(f"p={p} and a range of -30 to {-LIMIT + 2 * LIMIT / p:.0f}: {turned.min():.1f} to {turned.max():.1f}, mean of all {turned.mean():.1f}")
    ok += [abs(turned.min() + LIMIT) < 1, abs(turned.max() - LIMIT) < 1, abs(turned.mean()) < 0.5]
sys.exit(0 if all(ok) else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/rotate.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
