#!/usr/bin/env bash
# jax.jit, a number in a static field: f(config with gain=2.0) returns what was compiled for gain=2, if that was called
# before, and the other way round. A uint8 image [100, 200] times 2.0 is [200, 400] in float32; after one call with
# gain=2 it is [200, 144] in uint8, wrapped around, from a function that has no side effects. A flag that is True gets the
# program of 1. So is it with fields of a static dataclass or tuple, metadata of register_dataclass and flax.struct, linen
# modules as static arguments, and attributes of nnx modules under nnx.jit.
# Programs are found by == and hash, and Python's 2 == 2.0 == True + 1 with equal hashes. The documentation asks for both
# methods, and says that "Calling the jitted function with different values for these constants will trigger
# recompilation". An expert who has tried it with the number itself as the static argument has seen two programs: there jit
# compares the types, too, since its issue 9273. Inside of a container it does not.
# A configuration that was read from JSON or the command line has 2 where the default has 2.0, and the second experiment of a
# process, or the second test of a file, runs the first one's program: each alone is right.
# Right: float(...) in the constructor, or the number as a static argument of its own.
# Here with jax 0.10.2 and flax 0.12.8. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'flax==0.12.8' 2>/dev/null
cat >"$folder/static.py" <<'PYTHON'
import dataclasses
import sys

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

IMAGE = jnp.array([100, 200], jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Config:
    gain: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    image: jax.Array
    gain: float = dataclasses.field(metadata={"static": True})


@flax.struct.dataclass
class Struct:
    image: jax.Array
    gain: float = flax.struct.field(pytree_node=False)


class Linen(nn.Module):
    gain: float

    def __call__(self, x):
        return x * self.gain


class Nnx(nnx.Module):
    def __init__(self, gain):
        self.gain = gain

    def __call__(self, x):
        return x * self.gain


CASES = {  # name: a new jitted function, and its arguments for a gain
    "number": (lambda: jax.jit(lambda x, gain: x * gain, static_argnums=1), lambda gain: (IMAGE, gain)),
    "tuple": (lambda: jax.jit(lambda x, values: x * values[0], static_argnums=1), lambda gain: (IMAGE, (gain,))),
    "dataclass": (lambda: jax.jit(lambda x, c: x * c.gain, static_argnums=1), lambda gain: (IMAGE, Config(gain))),
    "register_dataclass": (lambda: jax.jit(lambda d: d.image * d.gain), lambda gain: (Registered(IMAGE, gain),)),
    "flax.struct": (lambda: jax.jit(lambda d: d.image * d.gain), lambda gain: (Struct(IMAGE, gain),)),
    "linen module": (lambda: jax.jit(lambda m, x: m.apply({}, x), static_argnums=0), lambda gain: (Linen(gain), IMAGE)),
    "nnx.jit": (lambda: nnx.jit(lambda m, x: m(x)), lambda gain: (Nnx(gain), IMAGE)),
}
print("jax", jax.__version__, "flax", flax.__version__)
ok = True
for name, (make, arguments) in CASES.items():
    alone, after = make()(*arguments(2.0)), make()
    after(*arguments(2))
    second = after(*arguments(2.0))
    print(f"{name}: 2.0 alone {alone.tolist()} {alone.dtype}, after a call with 2 {second.tolist()} {second.dtype}")
    ok &= alone.tolist() == [200, 400] and second.tolist() == ([200, 400] if name == "number" else [200, 144])
flag = jax.jit(lambda x, c: -x if c.gain is True else x * c.gain, static_argnums=1)
order = [flag(jnp.arange(1.0, 3.0), Config(value)).tolist() for value in (1, True)]
print("a flag that negates, called with 1 and then with True:", order)
sys.exit(0 if ok and order[0] == order[1] == [1, 2] else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/static.py"
