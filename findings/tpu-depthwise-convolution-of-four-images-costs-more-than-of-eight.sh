#!/usr/bin/env bash
# A depthwise convolution of four images costs a TPU more than one of eight, by its compiler's own estimate: three times the
# kernels and twice the cycles on v5e; v5p and v6e are alike. With fewer images than the eight sublanes of a register, the
# compiler cuts each image into strips that take the place of images, pads and copies them, and joins the result again. Nine
# shifted multiply-adds of the same array are one fusion without strips, with half of the cycles or less; for eight images
# and more they are worse than the convolution. A reader expects half of the work for half of the images, and the library's
# convolution to be as good as nine multiply-adds.
# Feed-forward layers of efficient transformers and autoencoders (SANA, DC-AE, EfficientViT, ConvNeXt) have such
# convolutions; sampling one image with guidance has two rows.
# Seen with libtpu 0.0.42.1, compiled without a device; cycles are the compiler's estimate, nothing was run. Exits 0 while
# that is so.
# Matters to: sampling and image by image encoding on TPU.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'libtpu==0.0.42.1' 2>/dev/null
export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_ACCELERATOR_TYPE=v5litepod-4 TPU_WORKER_HOSTNAMES=localhost
"$folder/venv/bin/python" - 2>"$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import importlib.metadata
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

SIZE, CHANNELS, WIDTH = 32, 4096, 1024


def convolution(x, kernel):
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel[:, :, None], (1, 1), "SAME", dimension_numbers=names, feature_group_count=x.shape[-1]
    )


def multiply_adds(x, kernel):
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(jnp.float32)
    height, width = x.shape[1:3]
    taps = (padded[:, i : i + height, j : j + width] * kernel[i, j] for i in range(3) for j in range(3))
    return sum(taps).astype(x.dtype)


def layer(depthwise):
    def program(x, expand, kernel, project):
        return jax.nn.silu(depthwise(jax.nn.silu(x @ expand), kernel)) @ project

    return program


x, kernel = (np.random.default_rng(0).standard_normal(shape).astype(np.float32) for shape in ((2, 5, 6, 8), (3, 3, 8)))
np.testing.assert_allclose(convolution(x, kernel), multiply_adds(x, kernel), rtol=1e-4, atol=1e-5)

place = SingleDeviceSharding(topologies.get_topology_desc("v5e:2x2", "tpu").devices[0])
found = {}
for depthwise in (convolution, multiply_adds):
    for images in (2, 4, 8, 16):
        shapes = (images, SIZE, SIZE, WIDTH), (WIDTH, CHANNELS), (3, 3, CHANNELS), (CHANNELS, WIDTH)
        inputs = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place) for shape in shapes)
        compiled = jax.jit(layer(depthwise)).lower(*inputs).compile()
        entry = compiled.as_text().partition("\nENTRY")[2]
        cycles = [int(number) for number in re.findall(r'"estimated_cycles":"(\d{1,12})"', entry)]
        found[depthwise, images] = sum(cycles)
        print(f"{depthwise.__name__:14s} {images:3d} images: {len(cycles):3d} kernels, {sum(cycles) / 1e6:6.2f} million cycles")
print("libtpu", importlib.metadata.version("libtpu"), "jax", jax.__version__)
assert found[convolution, 4] > found[convolution, 8], "half of the images cost less"
assert found[convolution, 2] > 1.5 * found[multiply_adds, 2], "the convolution is as good for few images"
assert found[convolution, 16] < found[multiply_adds, 16], "multiply-adds are as good for many images"
print("seen: four images cost more than eight")
PYTHON
