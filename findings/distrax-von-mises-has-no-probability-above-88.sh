#!/usr/bin/env bash
# distrax.VonMises: with a concentration above 88 (a standard deviation below 6 degrees) log_prob is -inf at every angle, the mode
# included, and its gradient with respect to the concentration is NaN. Samples, cdf, entropy and KL divergence of the same object
# are right, so that sampling from a policy and its entropy bonus work while its likelihood does not.
# The normalizer is the logarithm of the Bessel function i0, which overflows in float32 at 88; its exponentially scaled form, with
# which the entropy is computed, does not. The documentation gives no limit: concentration is a "positive parameter". scipy is right
# at any. A reader expects what holds for a normal distribution: a narrow one has a large density.
# It hurts whoever fits directions, hues or phases: training is fine until the model becomes sure of its answer, then the loss is
# infinite and all parameters are NaN.
# Right is concentration * (cos(x - loc) - 1) - log(2 pi i0e(concentration)). Seen with distrax 0.1.9. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'distrax==0.1.9' 'scipy==1.17.1' 2>/dev/null
cat >"$folder/angle.py" <<'PYTHON'
import importlib.metadata
import sys

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

print("distrax", importlib.metadata.version("distrax"), "jax", jax.__version__)
ANGLES = jnp.array([-0.3, 0.0, 0.05])


def stable(concentration):
    return concentration * (jnp.cos(ANGLES) - 1) - jnp.log(2 * jnp.pi * jax.scipy.special.i0e(concentration))


def gradients(concentration):
    def mode(value):
        return distrax.VonMises(0.0, value).log_prob(jnp.float32(0))

    return float(jax.grad(mode)(concentration)), float(jax.grad(lambda value: stable(value)[1])(concentration))


ok = []
for concentration in (1.0, 50.0, 87.0, 92.0, 200.0, 1000.0):
    one, exact = distrax.VonMises(0.0, concentration), stats.vonmises(concentration)
    found, expected = np.asarray(one.log_prob(ANGLES)), exact.logpdf(np.asarray(ANGLES, float))
    gradient, right_gradient = gradients(concentration)
    sample = one.sample(seed=jax.random.key(0), sample_shape=(20_000,))
    print(f"concentration {concentration:6.0f}: log_prob", *(f"{value:7.3f}" for value in found), end="; scipy ")
    print(*(f"{value:7.3f}" for value in expected), f"; gradient at the mode {gradient:.4f}, expected {right_gradient:.4f}")
    print(f"  deviation of samples {sample.std():.3f} and {exact.std():.3f}, entropy {one.entropy():.3f} and {exact.entropy():.3f}")
    ok += [abs(float(sample.std()) / exact.std() - 1) < 0.03, abs(float(one.entropy()) - exact.entropy()) < 1e-3]
    ok.append(bool(np.allclose(stable(concentration), expected, rtol=1e-3, atol=1e-3)))
    if concentration < 88:
        ok += [bool(np.allclose(found, expected, rtol=1e-3, atol=1e-3)), abs(gradient - right_gradient) < 1e-3]
    else:
        ok += [bool((found == -np.inf).all()), bool(np.isnan(gradient))]
sys.exit(0 if all(ok) else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/angle.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
