#!/usr/bin/env bash
# dm-pix, rotate and the random flips with images [C H W]: rotate turns the image about an axis within the plane of channels and rows,
# so that at 90 degrees every output pixel is a mix of colours or the edge of another row; random_flip_up_down reverses the colours
# (RGB becomes BGR) instead of the rows; random_flip_left_right turns the image upside down. The shape is right, no value leaves
# [0, 1], nothing is raised.
# The documentation of all three: "a JAX array representing an image. Assumes that the image is either HWC or CHW" (with leading
# axes for the flips). None has an argument for the channel axis, as flip_up_down, flip_left_right and the colour functions do, so
# that a reader takes it that they find out; in fact all three are written for [H W C]: the matrix of rotate turns the first two
# axes, and the flips call flip_up_down and flip_left_right without their channel_axis.
# It hurts whoever augments channels-first images: a small angle blends the three colours with each other, which looks like a shift of
# hue, and labels or poses that depend on left and right are flipped in the wrong direction.
# Right is to move the channels last and back, or flip_up_down(image, channel_axis=-3) under one's own condition.
# Here with dm-pix 0.4.5, the newest release. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'dm-pix==0.4.5' 'jax==0.10.2' 'jaxlib==0.10.2' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/channels.py" <<'PYTHON'
import importlib.metadata
import sys

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np

print("dm-pix", importlib.metadata.version("dm-pix"), "jax", jax.__version__)
SIDE = 32
rng = np.random.default_rng(0)
last = rng.random((SIDE, SIDE, 3)).astype(np.float32)
first = last.transpose(2, 0, 1)
key = jax.random.key(0)


def there_and_back(function):
    """The same for [C H W], by way of [H W C]."""
    return lambda image: jnp.moveaxis(function(jnp.moveaxis(image, 0, -1)), -1, 0)


def wrong(result, right):
    return float(np.abs(np.asarray(result) - right).max())


as_found = []
cases = {  # function of an image, the right result for [H W C]
    "rotate by 90 degrees": (lambda image: dm_pix.rotate(image, np.pi / 2), np.rot90(last)),
    "random_flip_up_down": (lambda image: dm_pix.random_flip_up_down(key, image, probability=1.0), last[::-1]),
    "random_flip_left_right": (lambda image: dm_pix.random_flip_left_right(key, image, probability=1.0), last[:, ::-1]),
}
for name, (function, right) in cases.items():
    right = right.transpose(2, 0, 1)
    errors = [wrong(function(last), right.transpose(1, 2, 0)), wrong(function(first), right), wrong(there_and_back(function)(first), right)]
    print(f"{name}: largest error [H W C] {errors[0]:.0e}, [C H W] {errors[1]:.2f}, moved there and back {errors[2]:.0e}")
    as_found += [errors[0] < 1e-4, errors[1] > 0.5, errors[2] < 1e-4, function(first).shape == first.shape]
up_down = np.asarray(cases["random_flip_up_down"][0](first))
left_right = np.asarray(cases["random_flip_left_right"][0](first))
as_found += [np.array_equal(up_down, first[::-1]), np.array_equal(left_right, first[:, ::-1])]
print(f"up_down is the image with reversed channels: {as_found[-2]}, left_right is the image upside down: {as_found[-1]}")

red = np.zeros((3, SIDE, SIDE), np.float32)
red[0] = 1.0  # an image of one colour, which no rotation and no flip can change
for degrees in (5, 30, 90):
    colour = np.asarray(dm_pix.rotate(red, np.deg2rad(degrees))).mean((1, 2))
    moved = np.asarray(there_and_back(lambda image: dm_pix.rotate(image, np.deg2rad(degrees)))(red)).mean((1, 2))
    print(f"a red image turned by {degrees} degrees: mean colour {colour.round(2)}, moved there and back {moved.round(2)}")
    as_found += [abs(colour - [1, 0, 0]).max() > 0.2, abs(moved - [1, 0, 0]).max() < 1e-4]
blue = np.asarray(cases["random_flip_up_down"][0](red)).mean((1, 2))
print(f"a red image after random_flip_up_down: mean colour {blue}")
as_found.append(np.array_equal(blue, [0, 0, 1]))
sys.exit(0 if all(as_found) else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/channels.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
