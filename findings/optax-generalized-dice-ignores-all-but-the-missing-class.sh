#!/usr/bin/env bash
# optax.losses.multiclass_generalized_dice_loss: if a class is in no target of the batch, all other classes count for nothing.
# Of four classes of which one is absent, the loss of a perfect prediction and of one that confuses the other three everywhere
# is the same, 1.07e-6, and so is the gradient, whatever the labels are: the model learns not to predict the absent class, and
# nothing else. A class is weighted by 1 / (number of its pixels squared + 1e-7). With no pixel that is ten million, with a
# thousand pixels a millionth; after the weights are scaled to a mean of one, the absent class has all of it. With dice_loss,
# its own base with equal weights, the two predictions have 0.00 and 0.75.
# The documentation: class weights are "automatically computed as the inverse of the squared class frequencies", which "helps
# handle class imbalance"; an absent class is not mentioned. The paper's loss is one ratio of sums over all classes, in which an
# absent class that is predicted nowhere adds nothing.
# Rare classes are what the loss is for, and with small batches most of them lack one: the loss is small and falls, a batch with
# all classes between them hides it. It hurts who trains masks, or a segmenter that scores generated images.
# Right are dice_loss with class_weights of the whole data set, and weights that are 0 for classes absent from the batch. Here
# with optax 0.2.8 and jax 0.10.2. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'optax==0.2.8' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/dice.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

CLASSES = 4
print("jax", jax.__version__, "optax", optax.__version__)
labels = np.random.default_rng(0).integers(0, CLASSES - 1, (2, 32, 32))  # class 3 does not occur
others = (labels + 1) % (CLASSES - 1)
rare = labels.copy()
rare[:, :8, :8] = CLASSES - 1


def logits(classes):
    return 20 * jax.nn.one_hot(classes, CLASSES)


def generalized(prediction, targets):
    return optax.losses.multiclass_generalized_dice_loss(prediction, jax.nn.one_hot(targets, CLASSES))


def equal_weights(prediction, targets):
    return optax.losses.dice_loss(prediction, jax.nn.one_hot(targets, CLASSES)).mean()


def published(prediction, targets):
    """Generalized Dice of Sudre et al., absent classes weighted as one pixel."""
    truth, guess = jax.nn.one_hot(targets, CLASSES), jax.nn.softmax(prediction)
    axes = (0, 1, 2)
    weights = 1 / jnp.maximum(truth.sum(axes), 1) ** 2
    return 1 - 2 * (weights * (truth * guess).sum(axes)).sum() / (weights * (truth + guess).sum(axes)).sum()


def compare(name, loss, targets, wrong):
    values = [float(loss(logits(each), targets)) for each in (targets, wrong)]
    gradients = [jax.grad(loss)(logits(wrong) / 20, each) for each in (targets, wrong)]
    change = float(jnp.linalg.norm(gradients[0] - gradients[1]) / jnp.linalg.norm(gradients[0]))
    print(f"{name:<32} right {values[0]:.2e}, all wrong {values[1]:.2e}; other labels change the gradient by {change:.1e} of it")
    return values, change


missing = compare("generalized, class 3 missing", generalized, labels, others)
present = compare("generalized, class 3 present", generalized, rare, np.where(rare < 3, others, 3))
plain = compare("dice_loss, class 3 missing", equal_weights, labels, others)
paper = compare("as published, class 3 missing", published, labels, others)
same = abs(missing[0][0] - missing[0][1]) < 1e-8 and missing[1] < 1e-3
right = all(values[1] - values[0] > 0.1 and change > 0.1 for values, change in (present, plain, paper))
sys.exit(0 if same and right else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/dice.py"
