"""Caches compiled programs on disk: JAX's compilation cache, and executables that run without tracing.

JAX serialises executables as pickles. They are read only from a directory that the user owns and nobody else may write
to, and only if they were compiled from the same sources and versions for the same kind of processor.
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

STATIC = ("config", "sampling", "settings", "size", "chunk", "window")  # static arguments
KEPT = 128  # most executables on disk; the oldest are deleted
FLAGS = ("jax_default_matmul_precision", "jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable")
ANEW = {"xla_embed_ir_in_executable": False}  # the default; with options JAX does not take what jit has in memory
UNKEPT = (RuntimeError, ValueError, NotImplementedError)  # raised by backends that cannot serialise executables
_OF_OTHERS = re.compile(r"'[\w.]+:[\w.]+'")  # names of code from outside the package, whose sources are not hashed
_executables: "Executables | None" = None


def keep_programs() -> None:
    """Caches compiled programs in the user's cache directory, or in the one that the environment names.

    Must be called before jax is imported, because JAX reads the environment then.
    """
    global _executables
    caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    own = pathlib.Path(caches) / "blip3o_jax"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(own / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    _executables = Executables(own / "executables") if hasattr(os, "getuid") else None


def run(program: Callable, *inputs: Any, **options: Any) -> Any:
    """Runs a jitted function on one device, by a cached executable if possible: `program(*inputs, **options)`."""
    if _executables is None or options:
        return program(*inputs, **options)
    return _executables(program, *inputs)


def recalled(what: str, make: Callable[[], Any]) -> Any:
    """Returns `make()`, which must be JSON values, or the result cached under the name `what` by an earlier process."""
    if _executables is None or _OF_OTHERS.search(what):
        return make()
    return _executables.recalled(what, make)


class Executables:
    """A disk cache of executables of jitted functions and of JSON values.

    Its directory is created if missing. Nothing is read or written if others may write to it.
    """

    def __init__(self, directory: pathlib.Path):
        self._directory, self._at_hand, self._making = directory, {}, threading.Lock()

    def __call__(self, program: Callable, *inputs: Any) -> Any:
        import jax

        named = list(zip(_parameters(program), inputs))
        static = tuple((name, value) for name, value in named if name in STATIC)
        traced = tuple(value for name, value in named if name not in STATIC)
        if _names_others(static) or jax.config.jax_default_device is not None:
            return program(*inputs)
        leaves, structure = jax.tree.flatten(traced)
        try:
            kinds = tuple((leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in leaves)
        except AttributeError:  # a Python number
            return program(*inputs)
        key = program, static, structure, kinds, tuple(getattr(jax.config, flag) for flag in FLAGS)
        if key not in self._at_hand:
            with self._making:  # only one thread may toggle JAX's cache
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
    """Compiles without JAX's caches: executables read from its cache on disk lack functions when serialised again.

    Observed with jax 0.10.2 on CPU: `findings/cached-cpu-executable-serializes-incomplete.sh`.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    enabled = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # otherwise JAX does not notice the change
        return lowered.compile(ANEW)
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def _is_own(path: pathlib.Path, kind: Callable[[int], bool]) -> bool:
    """Whether a path is of this kind, owned by the user, and writable by nobody else."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return kind(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@functools.cache
def _sources() -> str:
    """Returns a hash that identifies the sources of this package, including uncommitted changes."""
    package = pathlib.Path(__file__).parent
    seen = sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in package.rglob("*.py"))
    return hashlib.sha256(repr(seen).encode()).hexdigest()


@functools.cache
def _machine() -> tuple[str, ...]:
    """Returns versions, device and processor that an executable depends on."""
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
