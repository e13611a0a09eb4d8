#!/usr/bin/env bash
# Grain: training and validation split by slices of one shuffled dataset share elements from the second epoch on.
# With data = source.seed(0).shuffle(), data[:800].repeat() and data[800:] are disjoint in the first epoch; after the
# second, 152 of the 200 images held out for validation have been trained on, after the fourth all. The slice of a
# shuffled dataset is not a set of elements but of places: each epoch takes the first 800 of another permutation of all
# 1000. A subset, data[:100].repeat(), meant to overfit 100 images, walks through the whole dataset.
# The documentation: slice "Returns a dataset containing only the elements with indices in sl", repeat "Returns a dataset
# repeating the elements of this dataset multiple times", and upstream transformations are seeded anew so that "each epoch
# is shuffled and processed differently"; that the elements of a slice become others it does not say.
# list(data[:800]) gives the same 800 elements every time, len() is 800, and a check that the two are disjoint passes.
# shuffle() after slicing does not help if there was one before it. repeat(reseed_each_epoch=False) keeps the elements, in
# the same order every epoch. Right: split the unshuffled source (source[:800], source[800:], or every fifth), then shuffle.
# Grain's issue 1200 reports it. Here with grain 0.2.18. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'grain==0.2.18' 2>/dev/null
cat >"$folder/split.py" <<'PYTHON'
import sys

import grain

EPOCHS = 5
source = grain.MapDataset.range(1000)
data = source.seed(0).shuffle()
train, held_out = data[:800], set(data[800:])
print("grain", grain.__version__)
assert not held_out & set(train) and list(train) == list(train) and len(train) == 800


def trained_on(name, dataset):
    """Held-out elements that training has seen by the end of each epoch."""
    elements = list(dataset)
    seen = [len(held_out.intersection(elements[: 800 * (epoch + 1)])) for epoch in range(EPOCHS)]
    print(f"{name}: of {len(held_out)} held out, trained on by the end of epoch 1 to {EPOCHS}:", seen)
    return seen


overlaps = [
    trained_on("slice of shuffled, repeat", train.repeat(EPOCHS)),
    trained_on("slice of shuffled, shuffle, repeat", train.shuffle().repeat(EPOCHS)),
]
subset = len(set(data[:100].repeat(EPOCHS)))
print(f"subset of 100, {EPOCHS} epochs: {subset} different elements")
fixed = trained_on("slice of shuffled, repeat without reseeding", train.repeat(EPOCHS, reseed_each_epoch=False))
held_out = set(source[4::5])
kept = source.filter(lambda i: i % 5 != 4)
first = [element for element in kept.seed(0).shuffle().repeat(EPOCHS) if element is not None]
print("source split before shuffling:", len(held_out.intersection(first)), "trained on")
leaked = all(seen[0] == 0 and seen[1] > 100 and seen[-1] > 190 for seen in overlaps)
sys.exit(0 if leaked and subset > 300 and fixed == [0] * EPOCHS and not held_out.intersection(first) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/split.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
