"""Reads user files safely, writes files atomically, and checks that directories are writable.

All files from outside the package are read through this module: regular files only, up to a size limit.
"""

import collections
import contextlib
import errno
import json
import os
import pathlib
import stat
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from blip3o_jax.errors import UserError, require

MAX_BYTES = 2**30
MAX_JSON_BYTES = 2**28


def read_bytes(path: str | os.PathLike, what: str, limit: int = MAX_BYTES) -> bytes:
    """Reads a regular file.

    Args:
      path: `~` is expanded.
      limit: most bytes.

    Raises:
      UserError: the file is missing, unreadable, not regular (a device or pipe might never end), or too large.
    """
    try:
        place = os.path.expanduser(os.fspath(path))
        file = os.open(place, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # else opening a pipe would block
        with open(file, "rb") as stream:
            regular = stat.S_ISREG(os.fstat(file).st_mode)
            content = stream.read(limit + 1) if regular else b""
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(what, got=f"{path}: {reason}", expected="a readable file", do="check the path") from error
    require(regular, what, f"{path}, which is not a regular file", "a file", "copy it to one")
    require(len(content) <= limit, what, f"{path} of more than {limit:,} bytes", "a smaller file", "check the path")
    return content


def read_text(path: str | os.PathLike, what: str, limit: int = MAX_BYTES) -> str:
    """Reads a UTF-8 file without its byte order mark; otherwise as `read_bytes`."""
    try:
        return read_bytes(path, what, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(what, got=f"{path} ({error})", expected="UTF-8 text", do="convert it") from error


def read_json(path: str | os.PathLike, what: str, kind: type = dict, nan: str = "refused") -> Any:
    """Reads a JSON file.

    Args:
      nan: see `parse_json`; scheduler configurations of diffusers contain infinities.

    Raises:
      UserError: `read_text` refuses the file, it is not JSON, or its value has another type.
    """
    return parse_json(read_text(path, what, MAX_JSON_BYTES), f"{what} {path}", kind, nan)


def parse_json(text: str | bytes, where: str, kind: type = dict, nan: str = "refused") -> Any:
    """Parses JSON text; the names in an object must be unique.

    Args:
      where: its origin, for messages.
      nan: treatment of NaN and infinities, which Python and pandas write: refused | null | kept.

    Raises:
      UserError: the text is not JSON, or its value has another type; `where` names it.
    """
    name = {dict: "object", list: "array"}.get(kind, kind.__name__)
    try:
        value = json.loads(text, parse_constant=CONSTANTS[nan], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # also wrong encodings and too many digits
        raise UserError(where, got=f"invalid JSON ({error})", expected=f"a JSON {name}", do="correct it") from error
    require(isinstance(value, kind), where, f"JSON of type {type(value).__name__}", f"a JSON {name}", "correct it")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


CONSTANTS = {"refused": _no_constant, "null": lambda name: None, "kept": float}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        (twice, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} occurs twice in one object")
    return value


def inside(directory: str | os.PathLike, name: object, what: str) -> pathlib.Path:
    """Returns the path of a file that an index or configuration in the directory names.

    Links are allowed: a snapshot of the Hugging Face hub consists of links into its store.

    Args:
      what: the entry that contains the name, for messages.

    Raises:
      UserError: the name is absolute, leaves the directory, or is not a name.
    """
    good = isinstance(name, str) and name.strip() and "\0" not in name
    good = good and all(len(part.encode("utf-8", "replace")) < 256 for part in name.split("/"))  # of file systems
    relative = pathlib.PurePath(os.path.normpath(name) if good else "..")
    if relative.is_absolute() or ".." in relative.parts:
        raise UserError(what, got=repr(name)[:300], expected=f"the name of a file in {directory}", do="correct it")
    return pathlib.Path(directory) / relative


def output_file(path: str | os.PathLike, what: str = "output", suffixes: Sequence[str] = ()) -> pathlib.Path:
    """Returns the path of a file to write, with links resolved.

    Args:
      suffixes: allowed suffixes in lower case; empty: any.

    Raises:
      UserError: an empty name, another suffix, or a path that is not a regular file (a device, pipe or directory).
    """
    name = os.fspath(path)
    require(name.strip() and "\0" not in name, what, repr(name), "the name of a file", "name one")
    if suffixes and pathlib.PurePath(name).suffix.lower() not in suffixes:
        raise UserError(what, got=name, expected=f"a file name that ends in {' or '.join(suffixes)}", do="change it")
    given = pathlib.Path(os.path.expanduser(name))
    place = pathlib.Path(os.path.realpath(given)) if given.is_symlink() else given
    if os.path.lexists(place) and not place.is_file():
        raise UserError(what, got=f"{name}, which is not a regular file", expected="a file", do="choose another name")
    return place


def contained(directory: str | os.PathLike, path: str | os.PathLike, what: str) -> pathlib.Path:
    """Returns a path below a directory; links may lead only within it or into the store of the Hugging Face hub.

    Raises:
      UserError: the path leads elsewhere.
    """
    root, place = pathlib.Path(directory).resolve(), pathlib.Path(path).resolve()
    in_store = place.parent.name == "blobs" and place.parent.parent.name.startswith("models--")
    if not place.is_relative_to(root) and not in_store:
        raise UserError(what, got=f"{path}, a link to {place}", expected=f"a file in {directory}", do="copy it there")
    return pathlib.Path(path)


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file atomically, text as UTF-8; raises UserError if `path` exists and is not a regular file."""
    path = output_file(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def append_line(path: str | os.PathLike, line: str) -> None:
    """Appends one line atomically, under a file lock, and terminates an incomplete last line first.

    Raises:
      UserError: the line cannot be written completely, or `path` is not a regular file.
    """
    try:
        file = os.open(output_file(path), os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        with open(file, "r+b", buffering=0) as stream, _locked(file):
            end = stream.seek(0, os.SEEK_END)
            stream.seek(max(end - 1, 0))
            torn = stream.read(1) not in (b"", b"\n")
            content = f"{chr(10) * torn}{line}\n".encode()
            try:
                written = os.write(file, content)
                if written < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                os.truncate(file, end)
                raise
    except OSError as error:
        raise unwritable(pathlib.Path(path), error) from error


@contextlib.contextmanager
def _locked(file: int) -> Iterator[None]:
    """Locks a file against other processes, if the system and the file system support it."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl  # Unix only

        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed
    yield


@contextlib.contextmanager
def writable(directory: pathlib.Path) -> Iterator[None]:
    """Creates a directory and checks that it is writable; on exit, directories it created that are empty are removed.

    Raises:
      UserError: the directory cannot be created or written.
    """
    made: list[pathlib.Path] = []
    try:
        try:
            missing = [place for place in (directory, *directory.parents) if not os.path.lexists(place)]
            for place in reversed(missing):
                place.mkdir(exist_ok=True)
                made.append(place)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            raise unwritable(directory, error) from error
        yield
    finally:
        for place in reversed(made):
            with contextlib.suppress(OSError):  # not empty
                place.rmdir()


def unwritable(path: pathlib.Path, error: OSError) -> UserError:
    """Returns the UserError for a path that cannot be written."""
    reason = error.strerror or str(error)
    return UserError("output", got=path, expected=f"a place that can be written ({reason})", do="choose another one")
