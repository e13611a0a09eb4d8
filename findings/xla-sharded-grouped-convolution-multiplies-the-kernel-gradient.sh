#!/usr/bin/env bash
# The gradient of the kernel of a grouped (or depthwise) convolution is too large by a whole factor as soon as the batch
# is split over one axis of the mesh and a second axis is unused: twice as large on a mesh "data" 4 x "tensor" 2, four
# times on 2 x 4. XLA's partitioner adds up the partial gradients of all eight devices, although the devices of the
# second axis hold copies: all-reduce with replica_groups={{0,1,2,3,4,5,6,7}}. A dense convolution has the same error
# when height or width is split instead of the batch. Loss, outputs and the gradients of the input and of all other
# parameters are right, Adam hides the factor, and clipping by the global norm then scales all gradients by it.
# A program under jit is documented to mean the same however its arrays are split, and a mesh with one axis, the usual
# test, is right. A dense convolution with a split batch, same mesh, is right.
# Right on every mesh: jax.shard_map around the convolution and its sum, sums of shifted products instead of a grouped
# convolution, or a batch that is split over all axes. XLA compiles the same all-reduce for a TPU (libtpu, nothing is run there).
# Seen alike with jax 0.8.3, 0.10.2 and 0.12.0. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'libtpu==0.0.42.1' 2>/dev/null
cat >"$folder/convolution.py" <<'PYTHON'
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def loss(kernel, x, groups):
    y = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )
    return (y**2).sum()


def mesh_of(devices, shape):
    return Mesh(np.array(devices).reshape(shape), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


gradient = jax.jit(jax.value_and_grad(loss), static_argnums=2)
random = np.random.default_rng(0)
x = random.normal(size=(8, 16, 16, 8)).astype(np.float32)
BATCH, HEIGHT = PartitionSpec("data"), PartitionSpec(None, "data")
ok = jax.device_count() == 8
print(f"jax {jax.__version__}, {jax.device_count()} devices")
for shape, groups, spec, expected in (
    ((8, 1), 8, BATCH, 1), ((4, 2), 8, BATCH, 2), ((4, 2), 2, BATCH, 2), ((2, 4), 8, BATCH, 4), ((4, 2), 1, BATCH, 1),
    ((4, 2), 1, HEIGHT, 2),
):  # fmt: skip
    kernel = random.normal(size=(3, 3, 8 // groups, 8)).astype(np.float32)
    mesh = mesh_of(jax.devices(), shape)
    put = [jax.device_put(v, NamedSharding(mesh, s)) for v, s in ((kernel, PartitionSpec()), (x, spec))]
    (value, right), (value_split, split) = gradient(jnp.asarray(kernel), jnp.asarray(x), groups), gradient(*put, groups)
    ratio = np.asarray(split) / np.asarray(right)
    print(f"mesh {shape}, {groups} groups, x split as {spec}: loss {value:.1f} / {value_split:.1f}, "
          f"kernel gradient x {np.median(ratio):.3f}")  # fmt: skip
    ok &= bool(np.allclose(split, expected * np.asarray(right), rtol=1e-3, atol=0.1)) and abs(value_split / value - 1) < 1e-5
mesh = mesh_of(jax.devices(), (4, 2))
mapped = jax.shard_map(
    lambda kernel, x: jax.lax.psum(loss(kernel, x, 8), "data"),
    mesh=mesh, in_specs=(PartitionSpec(), BATCH), out_specs=PartitionSpec(),
)  # fmt: skip
kernel = random.normal(size=(3, 3, 1, 8)).astype(np.float32)
right, split = jax.grad(loss)(kernel, x, 8), jax.jit(jax.grad(mapped))(kernel, x)
print(f"mesh (4, 2), 8 groups, in shard_map: kernel gradient x {np.median(np.asarray(split / right)):.3f}")
ok &= bool(np.allclose(split, right, rtol=1e-3, atol=0.1))
mesh = mesh_of(topologies.get_topology_desc(topology_name="v5e:2x4", platform="tpu").devices, (4, 2))
shapes = [
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    for shape, spec in (((3, 3, 1, 128), PartitionSpec()), ((16, 32, 32, 128), BATCH))
]
program = jax.jit(jax.grad(loss), static_argnums=2).lower(*shapes, 128).compile().as_text()
groups = re.findall(r" = (\S+) all-reduce\(.*?replica_groups=(\{\{.*?\}\})", program)
print("compiled for TPU v5e, mesh (4, 2), depthwise: all-reduce", *groups[0])
sys.exit(0 if ok and groups[0][1] == "{{0,1,2,3,4,5,6,7}}" else 1)
PYTHON
export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8
export TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-8 TPU_WORKER_HOSTNAMES=localhost
"$folder/venv/bin/python" "$folder/convolution.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
