"""Where compiled programs are kept."""

import pathlib

import pytest

from blip3o_jax import compilation


def test_a_named_cache_directory_needs_no_home(monkeypatch, tmp_path):
    places = {"XDG_CACHE_HOME": str(tmp_path)}
    monkeypatch.setattr(compilation.os, "environ", places)
    monkeypatch.setattr(pathlib.Path, "home", lambda: pytest.fail("asked for a home"))
    compilation.keep_programs()
    assert places["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "blip3o_jax" / "xla")
