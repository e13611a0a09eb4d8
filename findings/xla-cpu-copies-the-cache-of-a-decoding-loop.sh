#!/usr/bin/env bash
# jax 0.10.2 on CPU: a decoding loop copies its whole key-value cache four times per token. The loop is the textbook one:
# jax.lax.fori_loop carries keys and values f32[1 heads slots width] per layer, writes one position of each with
# dynamic_update_slice, and attends to the result. The old cache is dead after the write, which could happen in place, and
# with two rows it does. With one row, fusion repeats the write for each of its two readers, the product of attention and the
# next iteration; two writes cannot share a buffer, so XLA adds copies. Eight layers of 1024 slots have 64 copies of 1 MB in
# the body of the loop, and a token takes about six times as long as without them. The same with jax 0.12.0.1.
# The same write within jax.lax.cond, whose condition is always true, stays one operation, without a copy. A test of a batch
# does not show it, nor one in bfloat16, where nothing is copied (but caches are converted).
# Counted in the compiled programs; the times are printed and not checked. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 2>/dev/null
cat >"$folder/cache.py" <<'PYTHON'
import re
import sys
import time

import jax
import jax.numpy as jnp

HEADS, SLOTS, WIDTH, LAYERS = 4, 1024, 64, 8


def plain(cache, new, slot):
    return jax.lax.dynamic_update_slice_in_dim(cache, new, slot, axis=2)


def conditional(cache, new, slot):
    return jax.lax.cond(slot >= 0, plain, lambda cache, *_: cache, cache, new, slot)


def decoding(write, rows, dtype):
    """Copies of a cache in the loop, microseconds of processor time per token, and the result."""

    def layer(x, keys, values, slot):
        new = jnp.broadcast_to(x[:, None, None], (rows, HEADS, 1, WIDTH)).astype(dtype)
        keys, values = write(keys, new, slot), write(values, 2 * new, slot)
        scores = jnp.einsum("bkgh,bksh->bkgs", jnp.tile(new, (1, 1, 2, 1)), keys).astype(jnp.float32)
        weights = jax.nn.softmax(jnp.where(jnp.arange(SLOTS) <= slot, scores, -1e9)).astype(dtype)
        x = x + jnp.einsum("bkgs,bksh->bkgh", weights, values).mean((1, 2)).astype(jnp.float32)
        return x / (1 + jnp.abs(x).max()), keys, values

    def token(slot, state):
        x, caches = state
        kept = []
        for keys, values in caches:
            x, *pair = layer(x, keys, values, slot)
            kept.append(tuple(pair))
        return x, kept

    def decode(x, caches, tokens):
        return jax.lax.fori_loop(0, tokens, token, (x, caches))[0]

    shape = rows, HEADS, SLOTS, WIDTH
    x, caches = jnp.ones((rows, WIDTH)), [(jnp.zeros(shape, dtype),) * 2 for _ in range(LAYERS)]
    program = jax.jit(decode).lower(x, caches, 0).compile()
    within = [part for part in re.split(r"\n(?=[%E])", program.as_text()) if part.startswith("%")]  # not the entry
    copies = sum(len(re.findall(r"\[%d,%d,%d,%d\]\S* copy\(" % shape, part)) for part in within)
    begin = time.process_time()
    result = jax.block_until_ready(program(x, caches, SLOTS))
    return copies, round(1e6 * (time.process_time() - begin) / SLOTS), result


print("jax", jax.__version__)
found = {}
for name, write, rows, dtype in (
    ("plain write", plain, 1, jnp.float32),
    ("write within a condition", conditional, 1, jnp.float32),
    ("plain write, two rows", plain, 2, jnp.float32),
    ("plain write, bfloat16", plain, 1, jnp.bfloat16),
):
    found[name] = decoding(write, rows, dtype)
    copies, time_of_token, _ = found[name]
    print(f"{name}: {copies} copies of a cache per token, {time_of_token} us per token")
same = bool(jnp.allclose(found["plain write"][2], found["write within a condition"][2]))
print("equal results:", same)
counts = [copies for copies, *_ in found.values()]
sys.exit(not (same and counts[0] == 8 * LAYERS and not any(counts[1:])))
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/cache.py"
