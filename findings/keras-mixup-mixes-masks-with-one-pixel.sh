#!/usr/bin/env bash
# Keras 3, MixUp with masks of segmentation: the masks are not mixed with those of the other images but with the first few numbers
# of the batch. If the number of one-hot classes is the size of the batch, every pixel of all masks gets the rest of the weight
# for one and the same class: 48 % of the target is wrong at alpha=1. Masks of class indices, one channel, come back with as many
# channels as there are images.
# The other masks are taken from the flattened array instead of along the batch: the places 0, 1, 2 ... of the permutation are numbers
# of the upper left pixels of image 0. The images and labels of the same call are mixed rightly.
# With bounding boxes the boxes of both images are joined within an image, their labels below each other: (8, 4, 4) boxes and
# (16, 2) labels for 8 images of two boxes. labels[i] belongs to boxes[i, :2] for the first 8, and the second half of the
# boxes has none.
# The documentation names images and labels and refers to "MixUp for Object Detection"; the layer accepts "segmentation_masks" and
# "bounding_boxes", as all of these layers do. A reader expects them to be mixed as the images are, or an error.
# It hurts whoever trains a segmenter with soft masks or a detector with it: the loss falls, for the target is partly right.
# Right is to pass the masks as a second batch of images with the same transformation: transform_images(masks, transformation).
# Here with Keras 3.15.1. Exits 0 while that is so.
# Matters to: training of segmentation and detection with Keras, on all backends.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'keras==3.15.1' 'jax==0.10.2' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/masks.py" <<'PYTHON'
import sys

import jax
import keras
import numpy as np
from keras import layers

print("keras", keras.__version__, "backend", keras.backend.backend(), "jax", jax.__version__)
IMAGES, SIDE, BOXES = 8, 16, 2
rng = np.random.default_rng(0)
images = rng.random((IMAGES, SIDE, SIDE, 3)).astype("float32")
labels = np.eye(IMAGES, dtype="float32")
classes = rng.integers(0, IMAGES, (IMAGES, SIDE, SIDE))
masks = np.eye(IMAGES, dtype="float32")[classes]
indices = classes[..., None].astype("float32")
boxes = {"boxes": rng.random((IMAGES, BOXES, 4)).astype("float32"), "labels": np.arange(IMAGES * BOXES).reshape(IMAGES, BOXES)}

mixup = layers.MixUp(alpha=1.0, seed=0, bounding_box_format="xyxy")
transformation = mixup.get_random_transformation(images)
weight = np.asarray(transformation["mix_weight"])
order = np.asarray(transformation["permutation_order"])


def mixed(values):
    share = weight.reshape(-1, *[1] * (values.ndim - 1))
    return share * values + (1 - share) * values[order]


def error(result, values):
    """The share of the targets that is wrong, of all that is given to a pixel."""
    return np.abs(np.asarray(result) - mixed(values)).sum() / 2 / mixed(values).sum()


wrong = [
    error(mixup.transform_images(images, transformation), images),
    error(mixup.transform_labels(labels, transformation), labels),
    error(mixup.transform_segmentation_masks(masks, transformation), masks),
    error(mixup.transform_images(masks, transformation), masks),
]
for name, share in zip(("images", "labels", "masks of one-hot classes", "the same as images"), wrong):
    print(f"{name}: {share:.0%} wrong")
result = np.asarray(mixup.transform_segmentation_masks(masks, transformation))
added = (result - weight[:, None, None, None] * masks) / (1 - weight)[:, None, None, None]
print(f"what is added to all masks, at every pixel: {added[0, 0, 0].round(2)}; the upper left pixel of mask 0: {masks[0, 0, 0]}")
single = np.asarray(mixup.transform_segmentation_masks(indices, transformation))
joined = {name: np.asarray(value) for name, value in mixup.transform_bounding_boxes(dict(boxes), transformation).items()}
print(f"masks of one channel, {indices.shape}, come back as {single.shape}")
print(f"boxes {boxes['boxes'].shape} and labels {boxes['labels'].shape} come back as {joined['boxes'].shape} and {joined['labels'].shape}")
ok = [max(wrong[0], wrong[1], wrong[3]) < 1e-5, wrong[2] > 0.2, result.shape == masks.shape]
ok += [np.allclose(added, masks.reshape(-1)[order], atol=1e-4), single.shape == (IMAGES, SIDE, SIDE, IMAGES)]
ok += [joined["boxes"].shape == (IMAGES, 2 * BOXES, 4), joined["labels"].shape == (2 * IMAGES, BOXES)]
sys.exit(0 if all(ok) else 1)
PYTHON
KERAS_BACKEND=jax JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/masks.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
