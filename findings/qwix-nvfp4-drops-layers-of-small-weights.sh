#!/usr/bin/env bash
# Qwix, quantization to "nvfp4": a layer whose weights are below 0.0058 becomes all zeros, its output the bias alone, and so does each
# block of 16 small weights in other layers. A matrix of standard deviation 0.003 has an error of 12 %, as it should; the same matrix
# divided by two 72 %, by three 100 %. At the other end values above 2688 are cut off. mxfp4, nf4 and int4 do not care for the size.
# NVFP4 has two scales, one in fp8 for a block and one in float32 for the tensor, that brings the fp8 scales into their range, 2**-9
# to 448. Here the second is missing: a block's scale, its largest weight divided by 6, is rounded to fp8 as it is, and to zero
# below 2**-10. The documentation only names the format; a reader expects that quantizing c * w is quantizing w.
# Nothing is raised, nothing is NaN: a division by the zero scale is clipped to 6, and 6 * 0 is 0. It hurts the layers that start at
# or near zero, gates and output projections of adaLN and of residual blocks, adapters, and normalized or factored weights. A model
# of usual weights (0.02) shows nothing. Right: divide the weights by max(abs(w)) / (6 * 448) first and multiply the output by it.
# Seen with qwix 0.1.8 and jax 0.10.2. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'flax==0.12.8' 'qwix==0.1.8' 'numpy==2.4.6' 2>/dev/null
cat >"$folder/small.py" <<'PYTHON'
import importlib.metadata
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import linen as nn

BLOCKS = {"nvfp4": 16, "mxfp4": 32, "nf4": 16, "int4": 16}
print("qwix", importlib.metadata.version("qwix"), "flax", flax.__version__, "jax", jax.__version__)
rng = np.random.default_rng(0)
matrix = rng.normal(size=(512, 512)).astype(np.float32)


def quantized(array, name):
    dtype = jnp.int4 if name == "int4" else name
    return np.asarray(qwix.dequantize(qwix.quantize(jnp.asarray(array), dtype, tiled_axes={0: BLOCKS[name]})))


def two_scales(array):
    scale = np.float32(np.abs(array).max() / (6 * 448))
    return quantized(array / scale, "nvfp4") * scale


def error(found, exact):
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


class Block(nn.Module):
    """A residual block whose output projection has learned a little from zero."""

    @nn.compact
    def __call__(self, x):
        hidden = nn.gelu(nn.Dense(512, name="inner")(x))
        return nn.Dense(256, name="output", kernel_init=nn.initializers.normal(0.001))(hidden)


errors, zeros, ratios = {}, {}, {}
for size in (0.02, 0.003, 0.0015, 0.001, 3000.0):
    array = matrix * np.float32(size)
    found = {name: quantized(array, name) for name in BLOCKS}
    errors[size] = {name: error(each, array) for name, each in found.items()}
    errors[size]["nvfp4, two scales"] = error(two_scales(array), array)
    zeros[size] = float((found["nvfp4"] == 0).mean())
    text = ", ".join(f"{name} {value:.0%}" for name, value in errors[size].items())
    print(f"standard deviation {size:g}: zeros in nvfp4 {zeros[size]:.0%}; error of {text}")
model, x = Block(), jnp.asarray(rng.normal(size=(64, 256)), jnp.float32)
params = model.init(jax.random.key(0), x)["params"]
exact = np.asarray(model.apply({"params": params}, x))
for name in ("nvfp4", "mxfp4"):
    rules = [qwix.QuantizationRule(module_path=".*", weight_qtype=name, tile_size=BLOCKS[name])]
    small = qwix.quantize_model(model, qwix.PtqProvider(rules))
    layout = jax.eval_shape(small.init, jax.random.key(0), x)["params"]
    output = np.asarray(small.apply({"params": qwix.quantize_params(params, layout)}, x))
    ratios[name] = float(np.linalg.norm(output) / np.linalg.norm(exact))
    print(f"residual block, quantized to {name}: size of its output against the exact one {ratios[name]:.3f}")
ok = errors[0.02]["nvfp4"] < 0.15 and errors[0.0015]["nvfp4"] > 0.5 and zeros[0.001] == 1 and errors[3000.0]["nvfp4"] > 0.3
ok &= all(value < 0.2 for each in errors.values() for name, value in each.items() if name != "nvfp4")
sys.exit(0 if ok and ratios["nvfp4"] == 0 and abs(ratios["mxfp4"] - 1) < 0.1 else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/small.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
