#!/usr/bin/env bash
# The gradient of max pooling with overlapping windows is wrong as soon as height, width or length is split over devices: it
# goes to elements that are the maximum of no window, and its sum changes. Of the sequence 1 9 2 3 | 8 4 7 5 on two devices,
# windows of 3, the elements get 0 0 1 3 3 0 2 0 instead of 0 3 0 0 3 0 2 0: the 9 gets nothing. The maxima and the loss are
# right, all numbers are finite, nothing is raised or logged, and a network still trains, with a wrong gradient in front of
# the pooling.
# It is so when a window is at least twice as long as its stride: windows of 2, 3 and 5 with stride 1 (local maxima of
# detectors, pyramid pooling, Inception) and 4, 5 and 7 with stride 2. Windows of 3 with stride 2, as in ResNet, are right,
# and so are a split batch, windows that do not overlap, and sums over windows. Minima (min pooling) are as wrong as maxima.
# A program under jit is documented to mean the same however its arrays are split; a reader who splits large images over
# devices (spatial partitioning) expects the gradient of one device. XLA's partitioner exchanges the borders and then selects
# within each device with shifted windows (select-and-scatter).
# Right on every mesh: the maximum of shifted slices, or pooling on a split batch. Seen alike with jax 0.10.2 and 0.12.0.1
# on simulated CPU devices. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 2>/dev/null
cat >"$folder/pool.py" <<'PYTHON'
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

jax.config.update("jax_num_cpu_devices", 8)
print("jax", jax.__version__)


def pool(x, window, stride, function=lax.max, start=-jnp.inf):
    """Pooling of all axes but the first and the last, padding SAME."""
    inner = x.ndim - 2
    return lax.reduce_window(x, start, function, (1, *[window] * inner, 1), (1, *[stride] * inner, 1), "SAME")


def maximum_of_slices(x, window, stride):
    """The same along axis 1, for an odd window and stride 1."""
    side = window // 2
    padded = jnp.pad(x, ((0, 0), (side, side), *[(0, 0)] * (x.ndim - 2)), constant_values=-jnp.inf)
    return functools.reduce(jnp.maximum, [padded[:, i : i + x.shape[1]] for i in range(window)])


def gradients(x, spec, devices, pooling):
    """Loss and gradient on one device and on several."""

    @jax.jit
    @jax.value_and_grad
    def program(x):
        y = pooling(x)
        return (y * (1 + jnp.arange(y.size, dtype=y.dtype).reshape(y.shape) % 7)).sum()

    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    one, many = program(x), program(jax.device_put(x, NamedSharding(mesh, spec)))
    return [np.asarray(value) for value in (*one, *many)]


def differs(name, x, spec, pooling, devices=8):
    loss, gradient, split_loss, split = gradients(x, spec, devices, pooling)
    wrong = int((np.abs(gradient - split) > 1e-3).sum())
    sums = f"sums {gradient.sum():,.0f} and {split.sum():,.0f}, losses {loss:,.0f} and {split_loss:,.0f}"
    print(f"{name}: {wrong} of {gradient.size} entries of the gradient differ; {sums}")
    if not np.isclose(loss, split_loss, rtol=1e-5):
        sys.exit(1)  # the forward pass is right
    return wrong > 0


sequence = np.array([1, 9, 2, 3, 8, 4, 7, 5], np.float32).reshape(1, 8, 1)
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
count = jax.jit(jax.grad(lambda x: pool(x, 3, 1).sum()))
one = np.asarray(count(sequence)).ravel().astype(int)
two = np.asarray(count(jax.device_put(sequence, NamedSharding(mesh, P(None, "data"))))).ravel().astype(int)
print("windows of 3 of 1 9 2 3 8 4 7 5, how often each element is the maximum:")
print("  expected, and on one device:", *one, "\n  on two devices:             ", *two)

images = np.random.default_rng(0).permutation(8 * 64 * 64).reshape(8, 64, 64, 1).astype(np.float32) / 8**5  # no ties
height, width, batch = P(None, "data"), P(None, None, "data"), P("data")
wrong = [
    differs(f"window {window}, stride {stride}, {name} split", images, spec, lambda x: pool(x, window, stride))
    for window, stride in ((2, 1), (3, 1), (5, 1), (4, 2), (5, 2), (7, 2))
    for name, spec in (("height", height), ("width", width))
]
wrong.append(differs("minimum, window 3, stride 1, height split", images, height, lambda x: pool(x, 3, 1, lax.min, jnp.inf)))
right = [
    differs("window 3, stride 2, height split", images, height, lambda x: pool(x, 3, 2)),
    differs("window 2, stride 2, height split", images, height, lambda x: pool(x, 2, 2)),
    differs("window 3, stride 1, batch split", images, batch, lambda x: pool(x, 3, 1)),
    differs("sum, window 3, stride 1, height split", images, height, lambda x: pool(x, 3, 1, lax.add, 0.0)),
    differs("maximum of shifted slices, height split", images, height, lambda x: maximum_of_slices(x, 3, 1)),
]
as_found = list(one) == [0, 3, 0, 0, 3, 0, 2, 0] and list(two) != list(one) and all(wrong) and not any(right)
sys.exit(0 if as_found else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/pool.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
