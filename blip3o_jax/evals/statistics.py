"""Intervals for shares and for means over tasks."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

Z95 = 1.959963984540054


def wilson(hits: float, count: int, z: float = Z95) -> tuple[float, float]:
    """Interval for a share by Wilson's score method, which holds for few trials and shares near 0 and 1.

    Args:
      hits: how often it happened.
      count: trials, independent, at least 1.
      z: width in standard deviations; the default is the 95 % interval.

    Returns:
      Lower and upper end, in [0, 1].
    """
    share = hits / count
    middle = share + z * z / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max((middle - reach) / scale, 0.0), min((middle + reach) / scale, 1.0)


def bootstrap_mean(groups: Mapping[str, Sequence[Sequence[float]]], draws: int = 2000, seed: int = 0):
    """Interval for the mean over groups of each group's mean, by resampling clusters within every group.

    Args:
      groups: group -> clusters -> values; the images of one prompt are a cluster, since they are alike.
      draws: resamples.
      seed: of the resamples.

    Returns:
      Lower and upper end of the 95 % interval.
    """
    rng = np.random.default_rng(seed)
    means = np.zeros(draws)
    for clusters in groups.values():
        sums = np.array([np.sum(values) for values in clusters])
        sizes = np.array([len(values) for values in clusters])
        drawn = rng.integers(len(clusters), size=(draws, len(clusters)))
        means += sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means / len(groups), [0.025, 0.975])
    return float(low), float(high)
