#!/usr/bin/env bash
# jax.random.ball with a high norm, such as p = 100, as an approximation of the cube: 42 % of all coordinates are exactly 0. In three
# dimensions 80 % of the points lie on a plane through the centre; with p = 50 it is 44 %. Right is none.
# jax.random.generalized_normal with the same p, which ball uses, is 0 as often, where it should be nearly uniform in [-1, 1].
# A draw is a gamma variable of shape 1 / p to the power 1 / p. With shape 0.01 more than a third of the gamma variables are below the
# smallest float32 and become 0; the power would have brought them back to ordinary numbers. jax.random.loggamma, which exists for this,
# is not used: exp(loggamma / p) has no zeros here.
# The documentation promises uniform samples in the unit Lp ball, for any p of 1 and more. A reader expects that a perturbation drawn with
# p = 100 is about one drawn from the cube; instead it leaves most directions out. Nothing is raised, all points are in the ball.
# Here with jax 0.10.2. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 2>/dev/null
cat >"$folder/ball.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpy as np

DRAWS = 200_000
key = jax.random.key(0)
print("jax", jax.__version__)
zeros = {}
for p in (2, 10, 50, 100):
    points = np.asarray(jax.random.ball(key, 3, p, (DRAWS,)))
    numbers = np.asarray(jax.random.generalized_normal(key, p, (DRAWS,)))
    exact = np.asarray(jnp.exp(jax.random.loggamma(key, 1 / p, (DRAWS,)) / p))
    zeros[p] = np.mean(points == 0), np.mean((points == 0).any(axis=1)), np.mean(numbers == 0), np.mean(exact == 0)
    print("p = {}: coordinates that are 0 {:.1%}, points with such {:.1%}; ".format(p, *zeros[p]), end="")
    print("generalized_normal {2:.1%}, by loggamma {3:.1%}".format(*zeros[p]))
as_described = (
    zeros[2][:3] == (0, 0, 0)
    and 0.4 < zeros[100][0] < 0.45
    and 0.75 < zeros[100][1] < 0.85
    and 0.4 < zeros[100][2] < 0.45
    and 0.15 < zeros[50][0] < 0.2
    and all(rate[3] == 0 for rate in zeros.values())
)
print("as described" if as_described else "no longer as described")
sys.exit(not as_described)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/ball.py"
