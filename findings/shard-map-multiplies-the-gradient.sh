#!/usr/bin/env bash
# jax.shard_map with the data-parallel step known from pmap, jax.grad of the local loss and then lax.pmean of the
# gradient: on 4 devices the gradient is 4 times too large. It is right under jax.pmap, and under shard_map with
# check_vma=False. By default (check_vma=True) the gradient with respect to replicated parameters is already summed
# over the devices, and the pmean of equal values changes nothing. Adam hides the factor; SGD and clipping do not.
# The reference describes check_vma as "additional validity checks and automatic differentiation optimizations",
# neither of which would change a result.
# Taking pmean of the loss, inside the gradient, is right by default (and wrong with check_vma=False, where every
# device gets its own gradient). Seen alike with jax 0.8.3, 0.10.2 and 0.12.0.1.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 2>/dev/null
cat >"$folder/step.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,))
weights, rows = jnp.ones(1), jnp.arange(8.0).reshape(8, 1)


def loss(weights, rows):
    return jnp.mean((rows @ weights) ** 2)


def mean_outside(weights, rows):
    return jax.lax.pmean(jax.grad(loss)(weights, rows), "data")


def mean_inside(weights, rows):
    return jax.grad(lambda weights: jax.lax.pmean(loss(weights, rows), "data"))(weights)


def sharded(step, **options):
    step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), **options)
    return float(jax.jit(step)(weights, rows)[0])


mapped = jax.pmap(mean_outside, "data", in_axes=(None, 0))
seen = {
    "one device": float(jax.grad(loss)(weights, rows)[0]),
    "pmap, pmean of the gradient": float(mapped(weights, rows.reshape(4, 2, 1))[0, 0]),
    "shard_map, pmean of the gradient, check_vma=False": sharded(mean_outside, check_vma=False),
    "shard_map, pmean of the gradient": sharded(mean_outside),
    "shard_map, gradient of the pmean": sharded(mean_inside),
}
print(f"jax {jax.__version__}, {jax.device_count()} devices")
for what, gradient in seen.items():
    print(f"{what}: gradient {gradient}")
sys.exit(0 if list(seen.values()) == [35.0, 35.0, 35.0, 140.0, 35.0] else 1)
PYTHON
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 "$folder/venv/bin/python" "$folder/step.py"
