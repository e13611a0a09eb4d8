"""Machines to compile for: their names, and programs by their compilers where those are installed."""

import importlib.util
import subprocess
import sys

import pytest

from blip3o_jax.errors import UserError
from blip3o_jax.plan import targets

TRY = """
import jax, jax.numpy as jnp
from blip3o_jax import sharding
from blip3o_jax.plan import program, targets
target = targets.open_target({name!r})
mesh = sharding.make_mesh({{"fsdp": -1}}, target.devices)
x = jax.ShapeDtypeStruct((256, 1024), jnp.bfloat16, sharding=sharding.batch_sharding(mesh, 2, 256))
w = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=sharding.batch_sharding(mesh, 2, 1024))
def f(x, w, count):
    return jax.lax.fori_loop(0, count, lambda _, x: jnp.tanh(x @ w), x)
compiled = jax.jit(f).lower(x, w, jax.ShapeDtypeStruct((), jnp.int32)).compile()
needs = program.read(compiled, mesh)
print(len(target.devices), target.memory_bytes, needs.peak_bytes, list(needs.loops.values()), needs.collectives)
"""


@pytest.mark.parametrize(
    ("text", "chip", "sizes"),
    [
        ("v5e:4x8", "v5e", (4, 8)),
        ("v5p:2x2x1", "v5p", (2, 2, 1)),
        ("v6e", "v6e", (1, 1)),
        ("h200", "h200", (1,)),
        ("a100-80gb:8", "a100-80gb", (8,)),
    ],
)
def test_names_of_targets(text, chip, sizes):
    assert targets.parse(text) == (chip, sizes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5x:2x2", "did you mean v5p?"),
        ("", "expected a chip of v4"),
        ("v5e:4", "expected 2 sizes - such as v5e:2x2"),
        ("v5p:2x2", "expected 3 sizes"),
        ("v5e:3x2", "expected even sizes"),
        ("h100:0", "expected 1 sizes - such as h100:8"),
        ("h100:two", "such as h100:8"),
        ("h100:2x4", "such as h100:8"),
    ],
)
def test_a_target_that_is_none_is_one_line(text, message):
    with pytest.raises(UserError, match=message):
        targets.parse(text)


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("v5e", "libtpu", "plan-tpu"), ("h200", "jax_cuda12_plugin", "plan-gpu")]
)
def test_a_compiler_that_is_not_installed_is_named(name, module, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"{module}.*pip install 'blip3o_jax\[{extra}\]'"):
        targets.open_target(name)


@pytest.mark.parametrize(
    ("name", "module", "devices"),
    [("v5e:2x4", "libtpu", 8), ("v4:2x2x1", "libtpu", 4), ("v6e", "libtpu", 1), ("h100:2", "jax_cuda12_plugin", 2),
     ("a100-80gb", "jax_cuda12_plugin", 1)],
)  # fmt: skip
def test_programs_are_compiled_by_the_targets_compiler(name, module, devices):
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install 'blip3o_jax[plan-tpu,plan-gpu]'")
    done = subprocess.run([sys.executable, "-c", TRY.format(name=name)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    count, memory, peak, _ = done.stdout.split(" ", 3)
    assert int(count) == devices and 0 < int(peak) < int(memory)
    assert ("all-gather" in done.stdout) == (devices > 1)
