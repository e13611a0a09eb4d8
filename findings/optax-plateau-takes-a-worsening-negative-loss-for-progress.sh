#!/usr/bin/env bash
# optax.contrib.reduce_on_plateau with a loss below zero, such as a negative log-likelihood of a density, an ELBO per image, or the
# negative of a reward: the learning rate is never reduced. A loss that stays at -100 counts as a new best at every step, and so
# does one that gets worse from -100 to -98.5 in 200 steps: best_value in the state rises with it. The same losses plus 1000 reduce
# the rate 19 times. With a patience of 10 and the default tolerances (rtol 1e-4, atol 0).
# An improvement is a value below (1 - rtol) * best - atol. For a negative best the product lies above it, so that the tolerance
# makes the test easier, not harder. The documentation calls rtol the "relative tolerance for measuring new optimum". A reader
# expects a plateau to be found for any loss, whatever constant is added to it: the gradients, and the training, are the same.
# At small losses of either sign it is a matter of rtol * |best|; nothing is raised, and a rate that stays high looks like a
# loss that has not settled yet.
# Right is rtol=0 with an atol of the loss's own scale.
# Here with optax 0.2.8. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'optax==0.2.8' 2>/dev/null
cat >"$folder/plateau.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

print("optax", optax.__version__, "jax", jax.__version__)
STEPS, PATIENCE = 200, 10
rng = np.random.default_rng(0)
settled = np.full(STEPS, -100.0)
worse = np.linspace(-100.0, -98.5, STEPS)
noisy = -100.0 + np.abs(rng.normal(size=STEPS)) * 1e-3


def run(losses, **tolerance):
    """Reductions of the learning rate by half, and the best value in the state."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=PATIENCE, **tolerance)
    state = plateau.init(jnp.zeros(3))
    update = jax.jit(lambda state, loss: plateau.update(jnp.ones(3), state, value=loss)[1])
    for loss in losses:
        state = update(state, jnp.float32(loss))
    return round(-np.log2(float(state.scale))), float(state.best_value)


found = {}
for name, losses in {"settled at -100": settled, "worse, from -100 to -98.5": worse, "-100 and noise of 0.001": noisy}.items():
    found[name] = run(losses), run(losses + 1000), run(losses, rtol=0.0, atol=1e-2)
    (own, best), (shifted, _), (absolute, _) = found[name]
    print(f"{name:<26} reductions: {own:>2}, best value {best:.2f}; plus 1000: {shifted}; rtol 0 and atol 0.01: {absolute}")
none = all(own == 0 and shifted > 5 and absolute > 5 for (own, _), (shifted, _), (absolute, _) in found.values())
rises = found["worse, from -100 to -98.5"][0][1] > -98.6
sys.exit(0 if none and rises else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/plateau.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
