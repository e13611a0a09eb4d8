#!/usr/bin/env bash
# An XLA executable for CPU that came out of JAX's persistent compilation cache cannot be serialized again. The same
# lines (lower, compile, serialize_executable.serialize) give a complete file when the program was compiled in that
# process and one of about half the size when it was found in the cache. Serializing and loading raise nothing; the
# first call in another process does: "Function ... not found". Whoever keeps executables has to compile them with the
# cache off. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2'
export JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR="$folder/cache" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
cat >"$folder/executable.py" <<'PYTHON'
import pathlib
import pickle
import sys

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable

path = pathlib.Path(sys.argv[2])
inputs = jnp.ones((4, 64)), jax.random.key(0)


def program(rows, key):
    draws = jax.random.gumbel(key, rows.shape)
    return jax.lax.fori_loop(0, 3, lambda _, rows: jnp.sort(rows + draws, axis=-1), rows)


if sys.argv[1] == "write":
    compiled = jax.jit(program).lower(*inputs).compile()
    path.write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
    print(f"{path.name}: {path.stat().st_size:,} bytes")
    sys.exit()
devices = jax.devices()[:1]
loaded = serialize_executable.deserialize_and_load(*pickle.loads(path.read_bytes()), execution_devices=devices)
try:
    outcome = f"sum {float(loaded(*inputs).sum()):.3f}"
except jax.errors.JaxRuntimeError as error:
    outcome = f"JaxRuntimeError: {error}"
print(f"{path.name}, run in another process: {outcome}")
as_found = outcome.startswith("sum") if path.name == "compiled" else "not found" in outcome
sys.exit(0 if as_found else 1)
PYTHON
run() { "$folder/venv/bin/python" "$folder/executable.py" "$@" 2>"$folder/log" || { cat "$folder/log"; exit 1; }; }
"$folder/venv/bin/pip" list 2>/dev/null | grep -E '^jax(lib)? '
run write "$folder/compiled"
run write "$folder/from-cache"
run run "$folder/compiled"
run run "$folder/from-cache"
