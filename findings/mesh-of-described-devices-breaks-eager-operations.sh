#!/usr/bin/env bash
# Inside jax.set_mesh with a mesh of devices that are only described (jax.experimental.topologies, for compiling ahead
# of time), every operation outside of jit raises AttributeError: "'Executable' object has no attribute
# 'local_devices'", even on arrays of the real device, and the message names neither mesh nor topology. Lowering and
# compiling work in there. Outside, and inside jax.sharding.use_abstract_mesh, eager operations work: compile under
# set_mesh, and make constants and keys before it, or as shapes.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'libtpu==0.0.42.1' 2>/dev/null
cat >"$folder/mesh.py" <<'PYTHON'
import importlib.metadata
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

mesh = topologies.make_mesh(topologies.get_topology_desc("v5e:2x2", "tpu"), (4,), ("data",))
x, shape = jnp.ones(4), jax.ShapeDtypeStruct((4,), jnp.float32)


def outcome(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "works"


seen = {"add, outside": outcome(lambda: x + 1)}
with jax.set_mesh(mesh):
    seen |= {
        "add, in set_mesh": outcome(lambda: x + 1),
        "random key, in set_mesh": outcome(lambda: jax.random.key(0)),
        "compile, in set_mesh": outcome(lambda: jax.jit(lambda x: x + 1).lower(shape).compile()),
    }
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    seen["add, in use_abstract_mesh"] = outcome(lambda: x + 1)
print(f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}")
for what, result in seen.items():
    print(f"{what}: {result}")
error = "AttributeError: 'Executable' object has no attribute 'local_devices'"
sys.exit(list(seen.values()) != ["works", error, error, "works", "works"])
PYTHON
JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost TPU_ACCELERATOR_TYPE=v5litepod-4 \
    "$folder/venv/bin/python" "$folder/mesh.py"
