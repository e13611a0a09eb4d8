#!/usr/bin/env bash
# jax.random.truncated_normal without an upper bound: of float32 draws above 4, one in about 2,000 is 3.4e38, the largest float32;
# above 5 there are ten different values, and above 5.3 all draws are 3.4e38 (-3.4e38 for the lower tail). Between 6 and 7 all
# draws are 7. Right means are 4.23 above 4, 5.19 above 5 and 6.16 between 6 and 7. Even above 3, five of a million are 3.4e38.
# Samples are the inverse error function of a uniform number between the error functions of the bounds. Near 1, float32 has steps of
# 6e-8, which is the probability of all that lies above 5.3; the uniform number is rounded to 1, its inverse is infinite, and
# clipping to the bounds makes it the largest finite number instead. Nothing is raised and no value is infinite or NaN.
# The documentation promises a truncated normal for any bounds. A reader expects draws near the bound, as scipy.stats.truncnorm
# makes them. -ndtri of a uniform number times the tail's probability is exact here, in float32.
# It meets those who draw noise levels or initial values from a tail: a single draw ends a training run.
# Here with jax 0.10.2. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 2>/dev/null
cat >"$folder/tail.py" <<'PYTHON'
import sys

import jax
import numpy as np
from jax.scipy.special import log_ndtr, ndtri
from scipy import stats

DRAWS = 1_000_000
key = jax.random.key(0)
print("jax", jax.__version__)
found = {}
for low, high in ((3, np.inf), (4, np.inf), (5, np.inf), (5.5, np.inf), (6, 7)):
    draws = np.asarray(jax.random.truncated_normal(key, low, high, (DRAWS,)), np.float64)
    huge, distinct, right = np.mean(draws > 1e38), len(np.unique(draws)), stats.truncnorm(low, high).mean()
    found[low] = draws.mean(), huge, distinct
    print(f"from {low} to {high}: mean {draws.mean():.4g}, right {right:.3f}; {huge:.2%} are 3.4e38; {distinct:,} distinct")
below = np.asarray(jax.random.truncated_normal(key, -np.inf, -6, (DRAWS,)))
print(f"below -6: from {below.min():.3g} to {below.max():.3g}")
uniform = jax.random.uniform(key, (DRAWS,), minval=1e-7)
exact = -ndtri(uniform * np.exp(log_ndtr(-6.0)))
print(f"above 6, from the tail's own probability: mean {exact.mean():.3f}, right {stats.truncnorm(6, np.inf).mean():.3f}")
as_described = (
    0 < found[4][1] < 0.01
    and found[4][0] > 1e30
    and found[5][2] < 20
    and found[5.5][1] == 1
    and found[6][2] == 1
    and found[6][0] > 6.99
    and below.max() < -1e38
    and abs(exact.mean() - stats.truncnorm(6, np.inf).mean()) < 0.01
)
print("as described" if as_described else "no longer as described")
sys.exit(not as_described)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/tail.py"
