#!/usr/bin/env bash
# safetensors 0.8.0: an array that numpy transposed is saved with the right shape and the elements in another order.
# kernel.T, which turns the kernel of a JAX layer into the weight that PyTorch expects, comes back as the elements of
# kernel read row by row; so do np.transpose of a convolution's kernel and np.asfortranarray. A symmetric or
# one-dimensional array is right by chance, names, shapes, dtypes and sizes all agree, and nothing is raised: an export
# whose biases and norms load correctly and whose matrices are noise.
# A reader of the documentation, "Tensors need to be contiguous and dense", expects an error, as safetensors.torch gives
# for the same layout, or the right file: a transposed matrix is contiguous for numpy (flags.forc) and dense. Releases
# 0.4.5 to 0.7.0 wrote the right file. 0.8.0 hands the address of the memory to the writer and no longer looks at the
# strides.
# safetensors.flax does the same to a jax.Array whose layout on the device is not row-major (here by jax.device_put with a
# Format), since np.asarray keeps that layout.
# Right are np.ascontiguousarray, and jnp.transpose, which copies. Issue 825 of safetensors reports Fortran order.
# Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/transposed.py" <<'PYTHON'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

random = np.random.default_rng(0)
dense = random.normal(size=(4, 3)).astype(np.float32)
convolution = random.normal(size=(3, 3, 2, 4)).astype(np.float32)
TENSORS = {
    "dense.weight": dense.T,
    "convolution.weight": convolution.transpose(3, 2, 0, 1),
    "fortran": np.asfortranarray(dense),
    "copied": np.ascontiguousarray(dense.T),
    "bias": dense[0],
}
save_file(TENSORS, sys.argv[1])
loaded = load_file(sys.argv[1])
print("safetensors", safetensors.__version__, "numpy", np.__version__)
right = {}
for name, array in TENSORS.items():
    assert loaded[name].shape == array.shape and loaded[name].dtype == array.dtype
    right[name] = bool(np.array_equal(loaded[name], array))
    layout = "C" if array.flags.c_contiguous else "F" if array.flags.f_contiguous else "other"
    print(f"{name} {array.shape}, layout {layout}: {'as saved' if right[name] else 'other elements'}")
untransposed = np.array_equal(loaded["dense.weight"].ravel(), dense.ravel())
print("dense.weight has the elements of the kernel in the kernel's own order:", untransposed)
scrambled = ["dense.weight", "convolution.weight", "fortran"] if sys.argv[2] == "scrambled" else []
sys.exit(0 if all(right[name] == (name not in scrambled) for name in TENSORS) and untransposed == bool(scrambled) else 1)
PYTHON
cat >"$folder/layout.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from safetensors.flax import load_file, save_file

kernel = jnp.arange(12.0).reshape(4, 3)
columns = jax.device_put(kernel, Format(Layout((1, 0)), kernel.sharding))
save_file({"transposed": jnp.transpose(kernel), "columns": columns}, sys.argv[1])
loaded = load_file(sys.argv[1])
right = [np.array_equal(loaded["transposed"], kernel.T), np.array_equal(loaded["columns"], kernel)]
print(f"jax {jax.__version__}: jnp.transpose as saved: {right[0]}; column-major layout as saved: {right[1]}")
sys.exit(0 if np.array_equal(columns, kernel) and right == [True, False] else 1)
PYTHON
for version in 0.7.0 0.8.0; do
  "$python" -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet "safetensors==$version" 'numpy==2.4.6' 2>/dev/null
done
"$folder/0.7.0/bin/python" "$folder/transposed.py" "$folder/old.safetensors" right
"$folder/0.8.0/bin/python" "$folder/transposed.py" "$folder/new.safetensors" scrambled
"$folder/0.8.0/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 2>/dev/null
JAX_PLATFORMS=cpu "$folder/0.8.0/bin/python" "$folder/layout.py" "$folder/jax.safetensors"
