#!/usr/bin/env bash
# jax.random.fold_in(key, i) is jax.random.split(key, n)[i], for every n. A program that splits a key into those of the
# weights and of dropout, and folds the step or the index of the sample into the same key, draws the same numbers twice:
# the noise of step 0 is the noise that made the weights, the noise of sample 1 is that of dropout. So it is with the
# implementations threefry2x32 (the default) and rbg; unsafe_rbg differs. Splitting into more keys later does not help,
# as split(key, 2) is the beginning of split(key, 3).
# jax's own check for keys used twice, jax_debug_key_reuse, says nothing: it lets fold_in pass any number of times,
# "safe so long as the folded-in value is different every time". The documentation of fold_in: "a new PRNG key that is a
# deterministic function of the inputs and is statistically safe for producing a stream of new pseudo-random values";
# that of split does not mention fold_in. An expert takes the two for different functions of the key, as they were while
# jax_threefry_partitionable was off, the default of older releases; with it off they differ here, too.
# Folding into one of the keys that split returned is right. Seen alike with jax 0.8.3 and 0.10.2.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 2>/dev/null
cat >"$folder/keys.py" <<'PYTHON'
import sys

import jax
import numpy as np

COUNT = 5


def same(key):
    split = jax.random.key_data(jax.random.split(key, COUNT))
    folded = [jax.random.key_data(jax.random.fold_in(key, i)) for i in range(COUNT)]
    return [bool((mine == other).all()) for mine, other in zip(folded, split)]


@jax.jit
def program(key):
    """Noise of the first two steps, and what was drawn for weights and dropout."""
    steps = [jax.random.normal(jax.random.fold_in(key, step), (4,)) for step in range(2)]
    weights, dropout = (jax.random.normal(own, (4,)) for own in jax.random.split(key))
    return *steps, weights, dropout


@jax.jit
def separate(key):
    of_steps, of_weights, of_dropout = jax.random.split(key, 3)
    steps = [jax.random.normal(jax.random.fold_in(of_steps, step), (4,)) for step in range(2)]
    return *steps, *(jax.random.normal(own, (4,)) for own in (of_weights, of_dropout))


print("jax", jax.__version__)
equal = {name: same(jax.random.key(7, impl=name)) for name in ("threefry2x32", "rbg", "unsafe_rbg")}
for name, each in equal.items():
    print(f"{name}: fold_in(key, i) == split(key, {COUNT})[i]: {each}")
with jax.threefry_partitionable(False):
    equal["off"] = same(jax.random.key(7))
    print(f"threefry2x32, jax_threefry_partitionable off: {equal['off']}")
with jax.debug_key_reuse(True):
    first, second, weights, dropout = map(np.asarray, program(jax.random.key(7)))
    try:
        jax.random.normal(jax.random.split(reused := jax.random.key(7))[0]), jax.random.split(reused)
        check = "nothing"
    except jax.errors.KeyReuseError:
        check = "KeyReuseError"
print(f"step 0 {first}, weights {weights}")
print(f"step 1 {second}, dropout {dropout}")
print(f"jax_debug_key_reuse on this program: nothing; on a second split of one key: {check}")
fresh = {np.asarray(drawn).tobytes() for drawn in separate(jax.random.key(7))}
as_found = all(equal["threefry2x32"]) and all(equal["rbg"]) and not any(equal["unsafe_rbg"] + equal["off"])
as_found &= np.array_equal(first, weights) and np.array_equal(second, dropout) and check == "KeyReuseError"
sys.exit(0 if as_found and len(fresh) == 4 else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/keys.py"
