"""Machines to compile for: their names, and programs by their compilers where those are installed."""

import importlib.metadata
import importlib.util
import subprocess
import sys

import jaxlib
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


def test_names_of_targets():
    named = {"v5e:4x8": (4, 8), "v5p:2x2x1": (2, 2, 1), "v6e": (1, 1), "h200": (1,), "a100-80gb:8": (8,)}
    assert {text: targets.parse(text) for text in named} == {
        text: (text.partition(":")[0], sizes) for text, sizes in named.items()
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5x:2x2", "did you mean v5p?"),
        ("", "expected a chip of v4"),
        ("v5e:4", "expected 2 sizes - such as v5e:2x2"),
        ("v5p:2x2", "expected 3 sizes"),
        ("v5e:3x2", "expected even sizes"),
        ("h100:0", "expected a number of devices - such as h100:8"),
        ("h100:two", "such as h100:8"),
        ("h100:2x4", "such as h100:8"),
    ],
)
def test_a_target_that_is_none_is_one_line(text, message):
    with pytest.raises(UserError, match=message):
        targets.parse(text)


CUDA = {"jax-cuda12-plugin": "0.10.2"}


def installed(monkeypatch, **versions):
    """Only these packages, jax among them, are there."""

    def version(package):
        if package not in versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["jaxlib<=9", 'libtpu==0.0.42.*; extra == "tpu"'])
    monkeypatch.setattr(jaxlib, "__version__", "0.10.2")


@pytest.mark.parametrize(
    ("name", "versions", "message"),
    [
        ("v5e", {}, r"\(libtpu\) is not installed.*pip install 'blip3o_jax\[plan-tpu\]' 'libtpu==0.0.42.\*'"),
        ("h200", {}, r"\(jax-cuda12-plugin\) is not installed.*pip install 'blip3o_jax\[plan-gpu\]'"),
        ("h200", CUDA, r"\(jax-cuda12-pjrt\) is not installed.*\[plan-gpu\]"),
        ("v5e", {"libtpu": "0.0.40"}, r"libtpu: got 0.0.40 - expected 0.0.42.*pip install 'libtpu==0.0.42.\*'"),
        ("v5e", {"libtpu": "0.0.421"}, "libtpu: got 0.0.421 - expected 0.0.42"),
        ("h200", {"jax-cuda12-plugin": "0.10.1"}, "plugin: got 0.10.1 - .*pip install 'jax-cuda12-plugin==0.10.2'"),
        ("h200", CUDA | {"jax-cuda12-pjrt": "0.10.1"}, "jax-cuda12-pjrt: got 0.10.1 - expected 0.10.2"),
    ],
)
def test_a_compiler_that_is_missing_or_of_another_jax_is_named(name, versions, message, monkeypatch):
    installed(monkeypatch, **versions)
    with pytest.raises(UserError, match=message):
        targets.open_target(name)


@pytest.mark.parametrize(
    ("name", "versions", "compiler"),
    [
        ("v5e", {"libtpu": "0.0.42.1"}, "libtpu 0.0.42.1"),
        ("v5e", {"libtpu": "0.0.42"}, "libtpu 0.0.42"),
        ("h100:2", CUDA | {"jax-cuda12-pjrt": "0.10.2"}, "jax-cuda12-plugin 0.10.2"),
    ],
)
def test_a_target_names_its_compiler(name, versions, compiler, monkeypatch):
    installed(monkeypatch, **versions)
    monkeypatch.setattr(targets, "_tpu", lambda *_: ((), 1))
    monkeypatch.setattr(targets, "_gpu", lambda *_: ((), 1))
    assert targets.open_target(name).compiler == compiler


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
