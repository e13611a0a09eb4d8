#!/usr/bin/env bash
# Grain, WindowShuffleMapDataset: unless the window divides the length of the dataset, one pass leaves elements out and
# gives others twice. Of the 1000 elements in the example of Grain's own documentation (MapDataset.pipe, a window of 128)
# 14 never come up and 14 come up twice. The length of the result is right, so that counting does not show it.
# The documentation: "Each unique index corresponds to exactly one shuffled index (i.e. there is a one-to-one mapping and
# hence a guarantee that no shuffled indices are repeated within a given window)". A reader expects a permutation of the
# dataset. The last window is permuted as if it were full; the indices past the end wrap around, and the elements that
# were moved past the end are not reached. An evaluation over one pass counts some images twice and others never, and a
# pass over the data to compute statistics, or latents to be cached, has holes.
# With repeat() the missing elements come at the beginning of the next epoch instead, where windows then lie across the
# border of the epochs, and the wrapped ones come a third time in two epochs.
# WindowShuffleIterDataset, MapDataset.shuffle and a window that divides the length are permutations.
# Here with grain 0.2.18. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'grain==0.2.18' 2>/dev/null
cat >"$folder/window.py" <<'PYTHON'
import collections
import sys

import grain


def count(name, elements, size):
    """Elements that are missing and elements that come more than once."""
    counts = collections.Counter(elements)
    missing, again = size - len(counts), [element for element, times in counts.items() if times > 1]
    most = max(counts.values())
    print(f"{name}: {len(elements)} elements, {missing} of {size} missing, {len(again)} more than once, up to {most} times")
    return missing, len(again), most


print("grain", grain.__version__)
data, window = grain.MapDataset.range(1000), grain.experimental.WindowShuffleMapDataset
documented = data.pipe(window, window_size=128, seed=0)
lost = count("window of 128", list(documented), 1000)
batches = [int(element) for batch in documented.batch(16) for element in batch]
same = count("window of 128, batches of 16", batches, 1000)
twice = count("window of 128, two epochs", list(documented.repeat(2)), 1000)
whole = [
    count("window of 125", list(data.pipe(window, window_size=125, seed=0)), 1000),
    count("shuffle", list(data.shuffle(seed=0)), 1000),
    count(
        "WindowShuffleIterDataset, window of 128",
        list(data.to_iter_dataset().pipe(grain.experimental.WindowShuffleIterDataset, window_size=128, seed=0)),
        1000,
    ),
]
ok = lost == same and lost[0] == lost[1] > 0 and lost[2] == 2 and twice[2] == 3
sys.exit(0 if ok and whole == [(0, 0, 1)] * 3 else 1)
PYTHON
"$folder/venv/bin/python" "$folder/window.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
