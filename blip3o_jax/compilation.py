"""Where compiled programs are kept between processes: JAX's own cache, and executables that are run without tracing.

JAX writes an executable as a pickle. One is read only from a directory that belongs to the user and that nobody else
may write to, and only if it was made by these very sources, versions and this kind of processor.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import os
import pathlib
import pickle
import re
import stat
import threading
from collections.abc import Callable
from typing import Any

STATIC = ("config", "sampling", "settings", "size", "chunk", "window")  # arguments that a program is compiled for
KEPT = 128  # executables; the oldest go
FLAGS = ("jax_default_matmul_precision", "jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable")
UNKEPT = (RuntimeError, ValueError, NotImplementedError)  # of backends that cannot write or read an executable
_OF_OTHERS = re.compile(r"'[\w.]+:[\w.]+'")  # code from outside the package, whose sources are not looked at
_executables: "Executables | None" = None


def keep_programs() -> None:
    """Keeps every compiled program in the user's cache directory, unless the environment names another one.

    JAX reads the environment when it is imported: call this before.
    """
    global _executables
    caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    own = pathlib.Path(caches) / "blip3o_jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(own / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    _executables = Executables(own / "executables") if hasattr(os, "getuid") else None


def run(program: Callable, *inputs: Any, **options: Any) -> Any:
    """`program(*inputs, **options)` of a jitted function on one device, by a kept executable where there is one."""
    if _executables is None or options:
        return program(*inputs, **options)
    return _executables(program, *inputs)


def recalled(what: str, make: Callable[[], Any]) -> Any:
    """`make()`, plain values, or what an earlier process made of it under the same name."""
    if _executables is None or _OF_OTHERS.search(what):
        return make()
    return _executables.recalled(what, make)


class Executables:
    """Executables of jitted functions, and plain values.

    Args:
      directory: made if it is missing. Where others may write to it nothing is read or written.
    """

    def __init__(self, directory: pathlib.Path):
        self._directory, self._at_hand, self._making = directory, {}, threading.Lock()

    def __call__(self, program: Callable, *inputs: Any) -> Any:
        """`program(*inputs)`."""
        import jax

        named = list(zip(_parameters(program), inputs))
        static = tuple((name, value) for name, value in named if name in STATIC)
        traced = tuple(value for name, value in named if name not in STATIC)
        if _names_others(static) or jax.config.jax_default_device is not None:
            return program(*inputs)
        leaves, structure = jax.tree.flatten(traced)
        try:
            kinds = tuple((leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in leaves)
        except AttributeError:  # a number of Python
            return program(*inputs)
        key = program, static, structure, kinds, tuple(getattr(jax.config, flag) for flag in FLAGS)
        if key not in self._at_hand:
            with self._making:  # one thread at a time switches JAX's cache off and on again
                if key not in self._at_hand:
                    name = f"{program.__module__}.{program.__name__}"
                    self._at_hand[key] = self._found_or_made(name, key, program, inputs)
        return self._at_hand[key](*traced)

    def _found_or_made(self, name: str, key: tuple, program: Callable, inputs: Any) -> Callable:
        import jax
        from jax.experimental import serialize_executable

        path = self._path(name, key[1:])
        held = self._read(path)
        if held is not None:
            with contextlib.suppress(*UNKEPT):
                parts = pickle.loads(held)
                return serialize_executable.deserialize_and_load(*parts, execution_devices=jax.devices()[:1])
        compiled = _compile_anew(program.lower(*inputs))
        with contextlib.suppress(*UNKEPT):
            self._write(path, pickle.dumps(serialize_executable.serialize(compiled)))
        return compiled

    def recalled(self, what: str, make: Callable[[], Any]) -> Any:
        """See the function."""
        path = self._path(what)
        held = self._read(path)
        if held is None:
            held = json.dumps(make()).encode()
            self._write(path, held)
        return json.loads(held)

    def _path(self, *what: Any) -> pathlib.Path:
        return self._directory / hashlib.sha256(repr((what, _sources(), _machine())).encode()).hexdigest()

    def _read(self, path: pathlib.Path) -> bytes | None:
        if not (_is_own(self._directory, stat.S_ISDIR) and _is_own(path, stat.S_ISREG)):
            return None
        digest, _, held = path.read_bytes().partition(b"\n")
        return held if hashlib.sha256(held).hexdigest().encode() == digest else None

    def _write(self, path: pathlib.Path, held: bytes) -> None:
        with contextlib.suppress(OSError):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _is_own(self._directory, stat.S_ISDIR):
                aside = path.with_name(f".{os.getpid()}.part")
                aside.write_bytes(hashlib.sha256(held).hexdigest().encode() + b"\n" + held)
                aside.chmod(0o600)
                os.replace(aside, path)
                for old in sorted(self._directory.iterdir(), key=lambda file: file.stat().st_mtime)[:-KEPT]:
                    old.unlink(missing_ok=True)


@functools.cache
def _parameters(program: Callable) -> tuple[str, ...]:
    return tuple(inspect.signature(program).parameters)


@functools.cache
def _names_others(static: tuple) -> bool:
    return _OF_OTHERS.search(repr(static)) is not None


def _compile_anew(lowered: Any) -> Any:
    """Without JAX's cache: what was read from it lacks functions once it is written again (jax 0.10.2 on CPU)."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    enabled = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # whether there is one is looked up once
        return lowered.compile()
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def _is_own(path: pathlib.Path, kind: Callable[[int], bool]) -> bool:
    """Whether the user owns such a file or directory, and nobody else may write to it."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return kind(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@functools.cache
def _sources() -> str:
    """Tells versions of this package apart, also while it is being written."""
    package = pathlib.Path(__file__).parent
    seen = sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in package.rglob("*.py"))
    return hashlib.sha256(repr(seen).encode()).hexdigest()


@functools.cache
def _machine() -> tuple[str, ...]:
    """What an executable runs on."""
    import jax
    import jaxlib

    device, processor = jax.devices()[0], pathlib.Path("/proc/cpuinfo")
    found = (
        re.search(r"^(?:flags|Features)\s*:.*$", processor.read_text(), re.MULTILINE) if processor.exists() else None
    )
    flags = os.environ.get("XLA_FLAGS", ""), os.environ.get("LIBTPU_INIT_ARGS", "")
    version = device.client.platform_version
    count = str(jax.device_count())
    return jax.__version__, jaxlib.__version__, device.device_kind, version, count, found[0] if found else "", *flags
