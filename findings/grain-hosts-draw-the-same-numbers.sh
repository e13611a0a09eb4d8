#!/usr/bin/env bash
# Grain, MapDataset split over hosts: with data.seed(0)[host::hosts].random_map(f), the usual order, all hosts draw the same
# random numbers at the same time. With four hosts and records that get a crop, a diffusion timestep or noise by f, a global
# batch of 1024 has 256 draws, each used four times; noise that should average out over the batch does not, and the loss of a
# step swings twice as much. It looks right on one host, images of the hosts are different ones, and the mean and the
# distribution over time are right.
# The generator of a record comes from the seed and its place in the dataset that random_map is called on, 0, 1, 2 ... in the
# slice of each host. After a slice also shuffle is the same permutation everywhere, and two datasets that are joined by mix
# get the same numbers in pairs, if random_map is applied to each: image 0 of both is cropped alike.
# The documentation: seed seeds "every downstream random transformation" uniquely, so as to avoid "accidentally reusing the same
# seed", and is recommended "right after the source"; random_map uses "a combination of the seed and the index of the
# element in the dataset". A reader who knows Grain's DataLoader expects what it does: there the generator goes by the record's
# place in the whole run, and the draws of hosts differ (ShardOptions).
# Right are random_map before the slice, which costs nothing since datasets are lazy, random_map after mix, and
# .seed(host) before random_map and after the slice and shuffle. With to_iter_dataset() it is the same as with MapDataset.
# Here with grain 0.2.18. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'grain==0.2.18' 2>/dev/null
cat >"$folder/hosts.py" <<'PYTHON'
import importlib.metadata
import sys

import grain
import numpy as np

HOSTS, RECORDS = 4, 4096
DATA = grain.MapDataset.range(RECORDS)


def draw(record, generator):
    return int(record), generator.random()


class Draw(grain.transforms.RandomMap):
    def random_map(self, record, generator):
        return draw(record, generator)


def load(host):
    """Grain's DataLoader of one host."""
    shard = grain.sharding.ShardOptions(host, HOSTS)
    sampler = grain.samplers.IndexSampler(RECORDS, shard_options=shard, shuffle=False, num_epochs=1, seed=0)
    return grain.DataLoader(data_source=range(RECORDS), sampler=sampler, operations=[Draw()], worker_count=0)


def numbers(name, parts):
    """How many different random numbers the hosts draw, as a share of the records, and the spread of their batch means."""
    draws = [list(part) for part in parts]
    records = {record for part in draws for record, _ in part}
    values = np.array([[value for _, value in part] for part in draws])  # [host, step]
    assert len(records) == values.size, "every record comes once"
    share = len(np.unique(values)) / values.size
    spread = values.mean(0).std() / (values.std() / len(draws) ** 0.5)  # 1 if independent
    print(f"{name:<44} {share:6.1%} of the numbers are different; spread of the mean over hosts {spread:.2f} of the expected")
    return share


print("grain", importlib.metadata.version("grain"))
seeded, hosts = DATA.seed(0), range(HOSTS)
same = [
    numbers("seed, slice, random_map", [seeded[host::HOSTS].random_map(draw) for host in hosts]),
    numbers("seed, shuffle, slice, random_map", [seeded.shuffle()[host::HOSTS].random_map(draw) for host in hosts]),
    numbers("seed, slice, shuffle, random_map", [seeded[host::HOSTS].shuffle().random_map(draw) for host in hosts]),
    numbers("seed, slice, to_iter_dataset, random_map",
            [seeded[host::HOSTS].to_iter_dataset().random_map(draw) for host in hosts]),
]
different = [
    numbers("seed, random_map, slice", [seeded.random_map(draw)[host::HOSTS] for host in hosts]),
    numbers("slice, seed of the host, random_map", [DATA[host::HOSTS].seed(host).random_map(draw) for host in hosts]),
    numbers("DataLoader with ShardOptions", [load(host) for host in hosts]),
]
places = [[int(record) // HOSTS for record in seeded[host::HOSTS].shuffle()] for host in hosts]
print("shuffle after the slice: the same permutation on all hosts:", all(each == places[0] for each in places))

first, second = DATA[: RECORDS // 2], DATA[RECORDS // 2 :]
each = grain.MapDataset.mix([part.seed(0).random_map(draw) for part in (first, second)], [0.5, 0.5])
after = grain.MapDataset.mix([first, second], [0.5, 0.5]).seed(0).random_map(draw)
pairs = [len({value for _, value in mixed}) / RECORDS for mixed in (each, after)]
print(f"two datasets: {pairs[0]:.1%} different with random_map before mix, {pairs[1]:.1%} after it")
as_found = all(abs(share - 1 / HOSTS) < 0.001 for share in same) and all(each == places[0] for each in places)
right = all(share > 0.999 for share in different)
sys.exit(0 if as_found and right and abs(pairs[0] - 0.5) < 0.001 and pairs[1] > 0.999 else 1)
PYTHON
"$folder/venv/bin/python" "$folder/hosts.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
