#!/usr/bin/env bash
# webdataset 1.0.2, WebDataset(urls, shardshuffle=N): the shards come in the same order in every epoch. The order is drawn once,
# when the dataset is made; each iteration over it begins with the same seed again. Up to 0.2.100 every epoch had an order of
# its own, as long as no seed was given. Nothing is raised or logged, all samples come, and .shuffle() behind it still differs
# between epochs, but mixes only shards that are near each other: whatever is sorted by shard (source, resolution, language)
# meets the same neighbours at the same learning rate in each epoch.
# The documentation: "shardshuffle: The number of shards to shuffle", beside detshuffle, "Whether to use deterministic
# shuffling", whose default is False. A reader takes the first for the one that is drawn anew, and gets the opposite: detshuffle
# has a new order in each epoch (within one process; workers of a DataLoader that start anew begin with the first again), and
# shardshuffle has one for all, even with seed=None.
# The argument "seed: Random seed for shuffling" decides that one order, and has no effect with resampled=True: two datasets
# with the same seed draw different shards.
# Right are detshuffle=True in one process or persistent workers, a new WebDataset for every epoch, and
# DataPipeline(SimpleShardList(urls), shuffle(N), ...). An open pull request of webdataset, 502, is about the first half.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 1.0.2 0.2.100; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "webdataset==$version" 2>/dev/null
done
cat >"$folder/shards.py" <<'PYTHON'
import importlib.metadata
import os
import sys

import webdataset as wds

SHARDS, EPOCHS = 20, 6
os.makedirs("data", exist_ok=True)
for shard in range(SHARDS):
    with wds.TarWriter(f"data/{shard:02}.tar") as writer:
        writer.write({"__key__": f"{shard:02}", "txt": "a caption"})
URLS = "data/{00..19}.tar"


def epochs(name, dataset):
    """The orders of the shards in epochs of one dataset: how many different ones there are."""
    orders = []
    for _ in range(EPOCHS):
        iterator = iter(dataset)
        orders.append(tuple(next(iterator)["__key__"] for _ in range(SHARDS)))
    print(f"{name}: {len(set(orders))} orders in {EPOCHS} epochs; {' '.join(orders[0][:5])} ..., {' '.join(orders[1][:5])} ...")
    return orders


version = importlib.metadata.version("webdataset")
print("webdataset", version)
shuffled = epochs("shardshuffle=20, expected 6", wds.WebDataset(URLS, shardshuffle=SHARDS))
ok = all(sorted(order) == sorted(shuffled[0]) and len(set(order)) == SHARDS for order in shuffled)
if version == "0.2.100":
    sys.exit(0 if ok and len(set(shuffled)) == EPOCHS else 1)
again = epochs("a new dataset", wds.WebDataset(URLS, shardshuffle=SHARDS))
detshuffle = epochs("detshuffle=True", wds.WebDataset(URLS, shardshuffle=SHARDS, detshuffle=True))
pipeline = wds.DataPipeline(wds.SimpleShardList(URLS), wds.shuffle(SHARDS), wds.tarfile_to_samples())
piped = epochs("DataPipeline with shuffle(20)", pipeline)
resampled = [epochs("resampled=True, seed=0", wds.WebDataset(URLS, shardshuffle=False, resampled=True, seed=0)) for _ in range(2)]
ok &= len(set(shuffled)) == len(set(again)) == 1 and shuffled != again
ok &= len(set(detshuffle)) == len(set(piped)) == EPOCHS and resampled[0][0] != resampled[1][0]
sys.exit(0 if ok else 1)
PYTHON
cd "$folder"
for version in 1.0.2 0.2.100; do
    "$folder/$version/bin/python" -W ignore shards.py 2>"$folder/log" || { cat "$folder/log"; exit 1; }
done
