"""Where compiled programs are kept between processes."""

import os
import pathlib


def keep_programs() -> None:
    """Keeps every compiled program in the user's cache directory, unless the environment names another one.

    JAX reads the environment when it is imported: call this before.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    cache = pathlib.Path(caches) / "blip3o_jax" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
