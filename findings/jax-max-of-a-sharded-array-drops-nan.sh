#!/usr/bin/env bash
# jnp.max of an array with a NaN is NaN, on one device. Of the same array split over eight devices it is a number: the
# all-reduce between the devices of the CPU backend leaves the NaN out. So do jnp.min, the maximum norm
# (jnp.linalg.norm(x, jnp.inf), optax.tree.norm(ord=jnp.inf)) and jax.lax.pmax, in float32, float16 and bfloat16, while
# jnp.argmax of the same array still points at the NaN, jnp.sum is NaN and pmax under vmap is NaN. A guard such as
# jnp.isfinite(jnp.abs(gradients).max()) passes a gradient with a NaN as soon as the parameters are sharded, and a test
# of it on one device does not show it. A maximum within a shard is right: it depends on the mesh and on the axis.
# The documentation of jax.numpy.max and jax.lax.pmax does not mention NaN; numpy's max, which it implements, propagates
# it, and a program under jit is documented to mean the same however its arrays are split.
# jnp.isnan(x).any() and jnp.sum find the NaN. Seen alike with jax 0.8.3 and 0.10.2. Between two processes it depends on
# the place: a NaN of the first one is kept, one of the second is lost. GPU and TPU not tried. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'optax==0.2.8' 2>/dev/null
cat >"$folder/maximum.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
split = NamedSharding(mesh, PartitionSpec("data"))
PROGRAMS = {
    "max": jnp.max,
    "min": jnp.min,
    "linalg.norm, infinity": lambda x: jnp.linalg.norm(x, jnp.inf),
    "optax.tree.norm, infinity": lambda x: optax.tree.norm([x], ord=jnp.inf),
    "sum": jnp.sum,
    "argmax": jnp.argmax,
    "isnan, any": lambda x: jnp.isnan(x).any(),
}
print(f"jax {jax.__version__}, optax {optax.__version__}, {jax.device_count()} devices")
seen = {}
for dtype in "float32", "float16", "bfloat16":
    values = np.arange(1.0, 9.0)
    values[3] = np.nan
    x = jnp.asarray(values, dtype)
    for name, program in PROGRAMS.items():
        one, eight = (jax.jit(program)(array) for array in (x, jax.device_put(x, split)))
        seen[name, dtype] = np.array_equal(np.float64(one), np.float64(eight), equal_nan=True)
        if dtype == "float32":
            print(f"{name} of {values.tolist()}: on one device {one}, on eight {eight}")
collective = jax.shard_map(lambda x: jax.lax.pmax(x, "data"), mesh=mesh, in_specs=split.spec, out_specs=PartitionSpec())
values = jnp.array([1, jnp.nan, 3, 4, 5, 6, 7, 8])
batched = jax.vmap(lambda x: jax.lax.pmax(x, "data"), axis_name="data")(values)
between = collective(values)
print(f"pmax of {values}: under vmap {batched[0]}, between devices {between[0]}")
rows = jnp.array([[1.0, jnp.nan], [2.0, 3.0]] * 4)
within = jax.jit(lambda x: x.max(axis=1))(jax.device_put(rows, split))
print(f"max of rows that are whole on a device: {within}")
expected = {"max", "min", "linalg.norm, infinity", "optax.tree.norm, infinity"}
as_found = all(same == (name not in expected) for (name, _), same in seen.items())
as_found &= bool(jnp.isnan(batched).all()) and not bool(jnp.isnan(between).any())
sys.exit(0 if as_found and bool(jnp.isnan(within[0])) else 1)
PYTHON
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8
"$folder/venv/bin/python" "$folder/maximum.py"
