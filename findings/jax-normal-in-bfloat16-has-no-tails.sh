#!/usr/bin/env bash
# jax.random.normal(key, shape, jnp.bfloat16): of a million numbers none is above 2.52 or below -2.90, where 5,900 and 1,900 are
# expected, and the mean is -0.012, twelve standard errors from 0. There are 128 different values, as many as the uniform
# variable has that goes through the inverse error function; they are not symmetric, since it is drawn from -1 on and
# never reaches 1. float16 ends at 3.18 and -3.49. jax.random.logistic in bfloat16 is -87.5 once in 128 draws, its mean -0.67.
# bfloat16 itself holds values like 3.5 and 4.25: drawing in float32 and rounding, as torch.randn(dtype=torch.bfloat16) does,
# gives the whole distribution. Initializers with bfloat16 parameters draw as here: lecun_normal has a mean of -0.018 deviations.
# The documentation: "Sample standard normal random values with given shape and float dtype"; no dtype is excepted. It hurts
# whoever draws the noise of a diffusion model in the dtype of the latents: the model is trained without large noise, and every
# batch of latents is darker than it should be by the same amount. The standard deviation, 0.997, does not show it.
# Right is jax.random.normal(key, shape).astype(jnp.bfloat16). Here with jax 0.10.2. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'scipy==1.17.1' 2>/dev/null
cat >"$folder/tails.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

COUNT = 1_000_000
KEY = jax.random.key(0)
print("jax", jax.__version__, f"{COUNT:,} draws")


def show(name, values, limits=(2.52, -2.9, 3.5)):
    x = np.asarray(values, np.float64)
    above, below, far = (x > limits[0]).sum(), (x < limits[1]).sum(), (np.abs(x) > limits[2]).sum()
    errors = x.mean() * COUNT**0.5
    print(
        f"{name:<28} {len(np.unique(x)):>7} values from {x.min():6.2f} to {x.max():5.2f}; mean {x.mean():+.4f} ({errors:+.1f} "
        f"standard errors), deviation {x.std():.4f}; {above} above {limits[0]}, {below} below {limits[1]}, {far} beyond {limits[2]}"
    )
    return x, above, below, errors


expected = [COUNT * stats.norm.sf(limit) for limit in (2.52, 2.9)] + [2 * COUNT * stats.norm.sf(3.5)]
print("expected: {:.0f} above 2.52, {:.0f} below -2.9, {:.0f} beyond 3.5".format(*expected))
bf16, above, below, errors = show("normal, bfloat16", jax.random.normal(KEY, (COUNT,), jnp.bfloat16))
half, *_ = show("normal, float16", jax.random.normal(KEY, (COUNT,), jnp.float16))
show("normal, float32", jax.random.normal(KEY, (COUNT,)))
_, right_above, right_below, right_errors = show(
    "float32 rounded to bfloat16", jax.random.normal(KEY, (COUNT,)).astype(jnp.bfloat16)
)
kernel = jax.nn.initializers.lecun_normal()(KEY, (1000, 1000), jnp.bfloat16)
lecun = np.asarray(kernel, np.float64) * 1000**0.5
print(f"lecun_normal in bfloat16, in standard deviations: from {lecun.min():.2f} to {lecun.max():.2f}, mean {lecun.mean():+.4f}")
logistic = np.asarray(jax.random.logistic(KEY, (COUNT,), jnp.bfloat16), np.float64)
print(f"logistic, bfloat16: mean {logistic.mean():.2f} instead of 0, {(logistic < -80).mean() * 128:.2f} in 128 below -80")
latents = jax.random.normal(jax.random.key(1), (8, 32, 128, 128), jnp.bfloat16).astype(jnp.float32).mean((1, 2, 3))
print("means of eight latents of 32 x 128 x 128:", *(f"{mean:+.4f}" for mean in latents), f"; standard error {(32 * 128 * 128) ** -0.5:.4f}")
as_found = above == below == 0 and errors < -5 and half.max() < 3.3 and logistic.mean() < -0.5 and bool((latents < -0.004).all())
right = abs(right_above / expected[0] - 1) < 0.1 and abs(right_below / expected[1] - 1) < 0.15 and abs(right_errors) < 4
sys.exit(0 if as_found and right else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/tails.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
