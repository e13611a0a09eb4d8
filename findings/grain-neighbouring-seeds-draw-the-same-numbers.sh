#!/usr/bin/env bash
# Grain, DataLoader with an IndexSampler: seeds 0 and 1 are nearly one and the same seed. Record number i of the run with
# seed 0 gets the random numbers of record i - 1 of the run with seed 1: of 1000 augmentations, 999 are drawn from the same
# generators. The order is shared as well: the second epoch of seed 0 is the first epoch of seed 1, and the third of
# seed 0 the first of seed 2. Runs with the seeds 0, 1 and 2, the usual way to tell chance from effect, see the same orders
# and the same noise, and hosts with seed = jax.process_index(), meant to draw independently, draw one sequence, shifted.
# The documentation: "seed: Seed for shuffling the dataset", and a generator "rng" of numpy for each record. numpy's own
# advice is that neighbouring seeds are independent, as SeedSequence hashes them; a reader who knows that of
# np.random.default_rng(0) and (1), or jax.random.key, expects it here. The sampler makes Philox(key=seed + index), which
# sets the key without hashing, and shuffles with seed + epoch. MapDataset.shuffle(seed=...) shares the latter.
# Independent are the streams of MapDataset.seed(0) and MapDataset.seed(1), or seeds far apart (here 0 and 2**31).
# Here with grain 0.2.18. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'grain==0.2.18' 2>/dev/null
cat >"$folder/seeds.py" <<'PYTHON'
import sys

import grain

RECORDS, EPOCHS = 1000, 3


class Augment(grain.transforms.RandomMap):
    def random_map(self, element, rng):
        return element, float(rng.random())


def loader(seed):
    sampler = grain.samplers.IndexSampler(
        RECORDS, shard_options=grain.sharding.NoSharding(), shuffle=True, num_epochs=EPOCHS, seed=seed
    )
    return grain.DataLoader(data_source=range(RECORDS), sampler=sampler, operations=[Augment()], worker_count=0)


def dataset(seed):
    return grain.MapDataset.range(RECORDS).seed(seed).shuffle().random_map(Augment()).repeat(EPOCHS)


def compare(name, first, second):
    """Whether an epoch of the first run has the next one's order, and random numbers that both runs draw in one epoch."""
    orders, numbers = [], []
    for run in (list(first), list(second)):
        order, drawn = zip(*run)
        orders.append([order[epoch * RECORDS : (epoch + 1) * RECORDS] for epoch in range(EPOCHS)])
        numbers.append(drawn[:RECORDS])
    order = [orders[0][epoch + 1] == orders[1][epoch] for epoch in range(EPOCHS - 1)]
    shared = len(set(numbers[0]) & set(numbers[1]))
    shifted = numbers[0][1:] == numbers[1][:-1]
    print(f"{name}: epochs 2 and 3 in the order of the other's 1 and 2: {order}, {shared} of {RECORDS} numbers shared"
          + (", shifted by one record" if shifted else ""))  # fmt: skip
    return all(order), shared


print("grain", grain.__version__)
found = [
    compare("DataLoader, seeds 0 and 1", loader(0), loader(1)),
    compare("DataLoader, seeds 0 and 2**31", loader(0), loader(2**31)),
    compare("MapDataset.seed, seeds 0 and 1", dataset(0), dataset(1)),
]
orders = [list(grain.MapDataset.range(RECORDS).shuffle(seed=seed).repeat(2)) for seed in (0, 1)]
explicit = orders[0][RECORDS:] == orders[1][:RECORDS]
print("MapDataset.shuffle(seed=0) and (seed=1), the second epoch of one is the first of the other:", explicit)
sys.exit(0 if found == [(True, RECORDS - 1), (False, 0), (False, 0)] and explicit else 1)
PYTHON
"$folder/venv/bin/python" "$folder/seeds.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
