#!/usr/bin/env bash
# jax.lax.top_k does not rank as argmax and sort do. 0.0 beats -0.0: top_k([-0.0, 0.0, 0.0], 2) takes the indices 1 and 2,
# where the documentation says "If two elements are equal, the lower-index element appears first", and the two are equal for
# ==, argmax, stable argsort, and NumPy. And a NaN is first or last by its sign bit, which is not printed: top_k(x) begins with
# the NaN, top_k(-(-x)) does too, and top_k(-x) leaves the NaN out, while argmax, max and sort treat both NaNs alike. Elements
# are compared as the integers behind their bits, so it is so in float32, bfloat16 and float16, with jit and without.
# -0.0 is what a mask leaves of a negative score, and what jnp.round makes of -0.4: of scores times a mask, the entries that
# are masked out rank by the sign that they had, and a router takes another expert than with argmax, torch.topk or NumPy.
# With NaN, the best of N samples is a sound one by top_k(-loss, 1) and the NaN by top_k(1 - loss, 1); a test of one form does
# not hold for the other. 0 / 0 has the sign bit set on x86 and not on other processors.
# Right are a stable argsort, and jnp.where(x == 0, 0.0, x) and jnp.where(jnp.isnan(x), -jnp.inf, x) before top_k. Adding 0.0,
# which turns -0.0 into 0.0, helps outside of jit only: XLA takes the addition out.
# Seen alike on CPU with jax 0.10.2 and 0.12.0.1. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 2>/dev/null
cat >"$folder/rank.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpy as np

print("jax", jax.__version__)
found, right = [], []
for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
    for name, top_k in (("", jax.lax.top_k), (", jit", jax.jit(jax.lax.top_k, static_argnums=1))):
        zeros = jnp.array([-0.0, 0.0, 0.0], dtype)
        first, second = np.asarray(top_k(zeros, 2)[1])
        order = np.asarray(jnp.argsort(zeros, descending=True, stable=True))[:2]
        print(f"{dtype.__name__}{name}, [-0.0, 0.0, 0.0]: top_k {first} {second}, argsort {order}, argmax {jnp.argmax(zeros)}")
        found.append((first, second) == (1, 2))
        right += [list(order) == [0, 1], int(jnp.argmax(zeros)) == 0, bool(jnp.all(zeros == zeros[0]))]
        right.append(list(np.asarray(top_k(jnp.where(zeros == 0, 0, zeros), 2)[1])) == [0, 1])

        nan = jnp.array([1, jnp.nan, 2], dtype)
        for title, x in (("x = [1, nan, 2]", nan), ("-x", -nan), ("-(-x)", -(-nan))):
            best = int(top_k(x, 1)[1][0])
            print(f"{dtype.__name__}{name}, {title}: top_k {best}, argmax {jnp.argmax(x)}, max {x.max()}, sorted {jnp.sort(x)}")
            found.append(best == (0 if title == "-x" else 1))
            right += [int(jnp.argmax(x)) == 1, bool(jnp.isnan(x.max())), bool(jnp.isnan(jnp.sort(x)[-1]))]

add = lambda x: jax.lax.top_k(x + 0.0, 1)[1]  # noqa: E731
added = [function(jnp.array([-0.0, 0.0])) for function in (add, jax.jit(add))]
print("top_k([-0.0, 0.0] + 0.0, 1):", added[0], "with jit:", added[1])
found.append([int(index[0]) for index in added] == [0, 1])
scores = jnp.array([-0.7, 0.3, -0.2, 0.9])
masked = scores * jnp.array([0.0, 0.0, 0.0, 1.0])  # only the last expert is allowed
chosen, expected = jax.lax.top_k(masked, 2)[1], np.argsort(-np.asarray(masked), kind="stable")[:2]
print("scores", scores, "times a mask:", masked, "top_k", chosen, "NumPy's stable argsort", expected)
found.append(list(np.asarray(chosen)) == [3, 1] and list(expected) == [3, 0])
loss = jnp.array([0.5, jnp.nan, 0.1])
print("lowest loss of", loss, "by top_k(-loss):", jax.lax.top_k(-loss, 1)[1], "by top_k of 1 - loss:", jax.lax.top_k(1 - loss, 1)[1])
found.append(int(jax.lax.top_k(-loss, 1)[1][0]) == 2 and int(jax.lax.top_k(1 - loss, 1)[1][0]) == 1)
sys.exit(0 if all(found) and all(right) else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/rank.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
