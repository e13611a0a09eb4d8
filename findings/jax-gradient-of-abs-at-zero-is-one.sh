#!/usr/bin/env bash
# The gradient of jnp.abs at 0 is 1, where sign(0) and PyTorch say 0. An L1 loss of an image that is reproduced exactly
# therefore has a gradient, the same for every pixel, and so has a total variation of a flat area at its borders. An L1
# penalty does not leave zeros alone: parameters that begin at 0, as the second matrix of a LoRA adapter or the last layer
# of a residual block, all step to the negative side, with Adam by the whole learning rate. In bfloat16, and for targets
# with 8 bits, many differences are exactly 0: here, of pixels that are off by -1, 0 or 1 of 255 equally often, the
# gradients of the loss do not cancel but add up to a third of the largest possible pull, to darker.
# The sign also depends on how the difference is written: the gradient of |prediction - target| with respect to the
# prediction is 1, of |target - prediction| it is -1. So is it with jnp.linalg.norm(x, 1) and optax.tree.norm(ord=1).
# The documentation of jax.numpy.abs and jax.lax.abs does not mention the gradient. Whoever knows that ties in jnp.maximum
# share the gradient, that jax.nn.relu takes 0, and that abs of a complex number takes 0, expects 0: jax.lax.abs selects
# by x >= 0. Gradients tested against PyTorch differ where a difference is exactly 0.
# jnp.maximum(x, -x) and x * jnp.sign(x) have the values of abs and the gradient 0.
# Seen alike with jax 0.8.3, 0.10.2 and 0.12.0.1. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'optax==0.2.8' 2>/dev/null
cat >"$folder/absolute.py" <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import optax

FUNCTIONS = {
    "abs(x)": jnp.abs,
    "abs(-x)": lambda x: jnp.abs(-x),
    "linalg.norm([x], 1)": lambda x: jnp.linalg.norm(x[None], 1),
    "optax.tree.norm([x], ord=1)": lambda x: optax.tree.norm([x], ord=1),
    "abs(complex(x))": lambda x: jnp.abs(x.astype(jnp.complex64)),
    "maximum(x, -x)": lambda x: jnp.maximum(x, -x),
    "x * sign(x)": lambda x: x * jnp.sign(x),
    "relu(x)": jax.nn.relu,
    "huber_loss(x)": lambda x: optax.losses.huber_loss(x),
}
print(f"jax {jax.__version__}, optax {optax.__version__}")
zero = jnp.float32(0)
at_zero = {name: float(jax.grad(function)(zero)) for name, function in FUNCTIONS.items()}
for name, gradient in at_zero.items():
    print(f"gradient of {name} at 0: {gradient:g}")
expected = dict.fromkeys(FUNCTIONS, 0.0) | dict.fromkeys(list(FUNCTIONS)[:4], 1.0) | {"abs(-x)": -1.0}

image = jnp.linspace(0, 1, 8)
loss, gradient = jax.value_and_grad(lambda x: jnp.abs(x - image).mean())(image)
print(f"L1 loss of the image itself: {loss:g}, its gradient {gradient}")
flat = jax.grad(lambda x: jnp.abs(jnp.diff(x, axis=0)).sum() + jnp.abs(jnp.diff(x, axis=1)).sum())(jnp.ones((4, 4)))
print("gradient of the total variation of a flat area:", flat.tolist())

adapter = {"a": jnp.ones(3), "b": jnp.zeros(3)}
optimizer = optax.adam(1e-3)
penalty = jax.grad(lambda parameters: 1e-6 * jnp.abs(parameters["b"]).sum())(adapter)
updates, _ = optimizer.update(penalty, optimizer.init(adapter))
print("zeros after a step of Adam on an L1 penalty of 1e-6:", optax.apply_updates(adapter, updates)["b"])

target = jax.random.randint(jax.random.key(0), (30000,), 1, 255)
prediction = (target + jax.random.randint(jax.random.key(1), target.shape, -1, 2)) / 255
pull = {
    name: float(jax.grad(lambda b: absolute(prediction + b - target / 255).mean())(zero))
    for name, absolute in (("abs", jnp.abs), ("maximum", lambda x: jnp.maximum(x, -x)))
}
print("gradient of a common brightness, errors of -1, 0 and 1 of 255 equally often:", pull)
ok = at_zero == expected and bool((gradient == 1 / 8).all()) and bool(flat.any()) and loss == 0
ok &= bool((updates["b"] < -9e-4).all()) and pull["abs"] > 0.3 and abs(pull["maximum"]) < 0.02
sys.exit(0 if ok else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/absolute.py"
