"""What is kept between processes: where, and whom it is taken from."""

import json
import os
import pathlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from blip3o_jax import compilation


@pytest.fixture
def kept(tmp_path):
    return compilation.Executables(tmp_path / "executables")


def doubled(x, size):
    return x * 2 + size


def program():
    """A jitted function that no process has seen."""
    return jax.jit(doubled, static_argnames="size")


def files_of(kept):
    return sorted(kept._directory.iterdir())


def test_a_named_cache_directory_needs_no_home(monkeypatch, tmp_path):
    places = {"XDG_CACHE_HOME": str(tmp_path)}
    monkeypatch.setattr(compilation.os, "environ", places)
    monkeypatch.setattr(compilation, "_executables", None)
    monkeypatch.setattr(pathlib.Path, "home", lambda: pytest.fail("asked for a home"))
    compilation.keep_programs()
    assert places["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "blip3o_jax" / "xla")


def test_an_executable_is_found_again_and_not_traced(kept, monkeypatch):
    x = jnp.arange(3.0)
    np.testing.assert_array_equal(kept(program(), x, 1), [1, 3, 5])
    np.testing.assert_array_equal(kept(program(), x, 5), [5, 7, 9])  # another program
    assert len(files_of(kept)) == 2 and all(file.stat().st_mode & 0o077 == 0 for file in files_of(kept))
    monkeypatch.setattr(compilation, "_compile_anew", lambda _: pytest.fail("compiled again"))
    np.testing.assert_array_equal(compilation.Executables(kept._directory)(program(), x, 1), [1, 3, 5])
    monkeypatch.setattr(compilation, "_sources", lambda: "other sources")
    with pytest.raises(pytest.fail.Exception):
        compilation.Executables(kept._directory)(program(), x, 1)


@pytest.fixture
def disk_cache(tmp_path):
    """JAX's own cache, empty."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for chosen in (settings, before):
        for name, value in chosen.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if chosen is settings:
            yield tmp_path / "xla"


def test_a_program_that_jit_has_read_from_jax_cache_is_kept_whole(kept, disk_cache):
    def waves(x):
        for number in range(4):
            x = jnp.tanh(x @ x + number) + jnp.sin(x)
        return x.sum(0) + jnp.exp(-x).max()

    run, x = jax.jit(waves), jnp.eye(8)
    run(x)
    jax.clear_caches()
    expected = run(x)  # from the cache on disk
    assert list(disk_cache.iterdir())
    kept(run, x)
    np.testing.assert_array_equal(compilation.Executables(kept._directory)(run, x), expected)


def linked(file):
    os.replace(file, file.parent.parent / "elsewhere")
    file.symlink_to(file.parent.parent / "elsewhere")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.parent.chmod(0o777),  # others may write to the directory
        lambda file: file.chmod(0o666),
        linked,
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
    ],
)
def test_nothing_is_read_that_another_could_have_written(spoil, kept, monkeypatch):
    kept(program(), jnp.arange(3.0), 1)
    spoil(*files_of(kept))
    monkeypatch.setattr(pickle, "loads", lambda _: pytest.fail("read"))
    again = compilation.Executables(kept._directory)
    np.testing.assert_array_equal(again(program(), jnp.arange(3.0), 1), [1, 3, 5])


@pytest.mark.parametrize("part", ["serialize", "deserialize_and_load"])
def test_a_backend_that_cannot_keep_an_executable_runs_it_all_the_same(part, kept, monkeypatch):
    def fails(*args, **options):
        raise ValueError("not supported")

    if part != "serialize":
        kept(program(), jnp.arange(3.0), 1)
    monkeypatch.setattr(serialize_executable, part, fails)
    again = compilation.Executables(kept._directory)
    np.testing.assert_array_equal(again(program(), jnp.arange(3.0), 1), [1, 3, 5])


def test_code_from_outside_the_package_is_not_kept(kept):
    named = jax.jit(lambda x, settings: x, static_argnames="settings")
    kept(named, jnp.arange(3.0), "{'sampler': 'mine.module:sampler'}")
    assert not kept._directory.exists()


def test_plain_values_are_made_once(kept, monkeypatch):
    monkeypatch.setattr(compilation, "_executables", kept)
    assert compilation.recalled("numbers", lambda: [1, 2]) == [1, 2]
    assert compilation.recalled("numbers", lambda: pytest.fail("made again")) == [1, 2]
    assert json.loads(files_of(kept)[0].read_bytes().partition(b"\n")[2]) == [1, 2]


def test_the_oldest_go(kept, monkeypatch):
    monkeypatch.setattr(compilation, "KEPT", 2)
    for number in range(4):
        kept.recalled(f"value {number}", lambda number=number: number)
        os.utime(kept._path(f"value {number}"), (number, number))
    assert len(files_of(kept)) == 2
    assert kept.recalled("value 3", lambda: None) == 3
