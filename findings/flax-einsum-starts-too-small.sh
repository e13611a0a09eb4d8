#!/usr/bin/env bash
# flax.nnx.Einsum and flax.linen.Einsum, with the default kernel_init, start with weights that are too small by the square root
# of the number of heads or experts. The layer of nnx.Einsum's own example, "nta,hab->nthb" with a kernel of 8 heads, gives
# outputs of standard deviation 0.35 for inputs of 1; with 64 heads or experts it is 0.125. A Dense, DenseGeneral or
# LinearGeneral layer for the same product gives 1, at the same default (lecun_normal). With queries and keys made so, the
# attention logits of 16 heads are 16 times too small and attention is uniform; outputs of 64 experts lose 98 % of their power.
# Everything trains, later than it should, and no shape or dtype shows it.
# The initializer takes the second last axis of the kernel as its input and counts all further axes as a receptive field, as of
# a convolution: heads and experts are taken for positions that are summed. The documentation of jax.nn.initializers says that
# of kernels in general; that of Einsum says "kernel_init: initializer function for the weight matrix", and the layer knows from
# its equation which axes are summed. A reader expects the variance to be kept, as by the layers for which it stands.
# If the head is the second axis, "btd,dhk->bthk", even the input axis is another one, and the error is the same. An equation
# that does sum over all axes but the last, "bthk,hkd->btd", is right.
# Right is to name the axes: kernel_init=nnx.initializers.lecun_normal(batch_axis=(0,)) for a kernel that begins with the heads.
# Seen alike with flax 0.12.8 and 0.12.12. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'flax==0.12.8' 2>/dev/null
cat >"$folder/start.py" <<'PYTHON'
import sys

import flax
import jax
import jax.numpy as jnp
from flax import linen, nnx

D, HEAD = 256, 32
print("jax", jax.__version__, "flax", flax.__version__)


def normal(*shape):
    return jax.random.normal(jax.random.key(0), shape)


def deviation(name, layer, x, expected):
    """Standard deviation of the layer's outputs over its expected one; inputs have 1."""
    if isinstance(layer, linen.Module):
        y = layer.apply(layer.init(jax.random.key(1), x), x)
    else:
        y = layer(x)
    print(f"{name:<62} {x.std():.3f} -> {y.std():.3f}, expected 1")
    return abs(float(y.std()) - expected) < 0.05 * expected


def nnx_einsum(equation, *shape, **options):
    return nnx.Einsum(equation, shape, rngs=nnx.Rngs(1), **options)


x = normal(8, 64, D)
ok = []
for heads in (8, 16, 64):
    small = heads**-0.5
    ok += [
        deviation(f"nnx.Einsum nta,hab->nthb, {heads} heads", nnx_einsum("nta,hab->nthb", heads, D, HEAD), x, small),
        deviation(f"nnx.Einsum btd,dhk->bthk, {heads} heads", nnx_einsum("btd,dhk->bthk", D, heads, HEAD), x, small),
        deviation(f"linen.Einsum btd,dhk->bthk, {heads} heads", linen.Einsum((D, heads, HEAD), "btd,dhk->bthk"), x, small),
        deviation(f"linen.DenseGeneral, {heads} heads", linen.DenseGeneral((heads, HEAD)), x, 1),
        deviation(f"nnx.LinearGeneral, {heads} heads", nnx.LinearGeneral(D, (heads, HEAD), rngs=nnx.Rngs(1)), x, 1),
    ]
tokens = normal(64, 16, D)
ok.append(deviation("nnx.Einsum ebd,edf->ebf, 64 experts", nnx_einsum("ebd,edf->ebf", 64, D, D), tokens, 1 / 8))
head_outputs = normal(8, 64, 16, HEAD)
ok.append(deviation("nnx.Einsum bthk,hkd->btd, 16 heads", nnx_einsum("bthk,hkd->btd", 16, HEAD, D), head_outputs, 1))
of_heads = nnx.initializers.lecun_normal(batch_axis=(0,))
layer = nnx_einsum("nta,hab->nthb", 16, D, HEAD, kernel_init=of_heads)
ok.append(deviation("nnx.Einsum nta,hab->nthb, 16 heads, batch_axis=(0,)", layer, x, 1))

query = nnx_einsum("nta,hab->nthb", 16, D, HEAD)
key = nnx.Einsum("nta,hab->nthb", (16, D, HEAD), rngs=nnx.Rngs(2))
logits = jnp.einsum("nthb,nshb->nhts", query(x), key(x)) / HEAD**0.5
print(f"attention logits of 16 heads: standard deviation {logits.std():.3f}, expected 1")
ok.append(abs(float(logits.std()) - 1 / 16) < 0.01)
sys.exit(0 if all(ok) else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/start.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
