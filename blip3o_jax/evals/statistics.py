"""Confidence intervals of fractions and of means over tasks."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

RESAMPLES = 2000  # of the bootstrap
Z95 = 1.959963984540054  # standard deviations of a two-sided 95 % interval


def wilson(hits: float, count: int) -> tuple[float, float]:
    """Returns the 95 % Wilson score interval of the fraction of `hits` in `count` >= 1 independent trials."""
    share, z = hits / count, Z95
    middle = share + z * z / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max((middle - reach) / scale, 0.0), min((middle + reach) / scale, 1.0)


def bootstrap_mean(groups: Mapping[str, Sequence[Sequence[float]]]) -> tuple[float, float]:
    """Returns the 95 % bootstrap interval of the mean over groups of their means, resampling clusters within groups.

    Args:
      groups: group -> clusters -> values; the images of one prompt form a cluster.
    """
    rng = np.random.default_rng(0)
    means = np.zeros(RESAMPLES)
    for clusters in groups.values():
        sums = np.array([np.sum(values) for values in clusters])
        sizes = np.array([len(values) for values in clusters])
        drawn = rng.integers(len(clusters), size=(RESAMPLES, len(clusters)))
        means += sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means / len(groups), [0.025, 0.975])
    return float(low), float(high)
