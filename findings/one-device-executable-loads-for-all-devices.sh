#!/usr/bin/env bash
# jax.experimental.serialize_executable loads a program that was compiled for one device as a program of all devices of
# the process: with eight of them loading raises nothing, and the first call asks for eight shards. A host with one
# device never shows it. The argument execution_devices names the device, and the program runs.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 2>/dev/null
cat >"$folder/load.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
from jax.experimental.serialize_executable import deserialize_and_load, serialize

held = serialize(jax.jit(lambda x: 2 * x).lower(jnp.ones(4)).compile())
outcomes = []
for options in {}, {"execution_devices": jax.devices()[:1]}:
    loaded = deserialize_and_load(*held, **options)
    try:
        outcomes.append(str(loaded(jnp.ones(4))))
    except jax.errors.JaxRuntimeError as error:
        outcomes.append(str(error))
print(f"jax {jax.__version__}, {jax.device_count()} devices: default {outcomes[0]!r}; named device {outcomes[1]!r}")
works = [outcome == "[2. 2. 2. 2.]" for outcome in outcomes]
sys.exit(0 if works == [jax.device_count() == 1, True] else 1)
PYTHON
export JAX_PLATFORMS=cpu
"$folder/venv/bin/python" "$folder/load.py"
XLA_FLAGS=--xla_force_host_platform_device_count=8 "$folder/venv/bin/python" "$folder/load.py"
