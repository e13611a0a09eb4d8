"""Files that a user hands over, files that appear whole, and directories that can be written.

Files from outside are read here: regular ones, up to a size.
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

from blip3o_jax.errors import UserError

MAX_BYTES = 2**30  # of a file that is read whole
MAX_JSON_BYTES = 2**28


def read_bytes(path: str | os.PathLike, what: str, limit: int = MAX_BYTES) -> bytes:
    """Contents of a regular file.

    Args:
      path: of the file; `~` is expanded.
      what: it is, for the message.
      limit: bytes it may have.

    Raises:
      UserError: it is missing, cannot be read, is no regular file (a device or pipe may never end), or is too large.
    """
    try:
        place = os.path.expanduser(os.fspath(path))
        file = os.open(place, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # opening a pipe waits for its writer
        with open(file, "rb") as stream:
            regular, content = stat.S_ISREG(os.fstat(file).st_mode), b""
            if regular:
                content = stream.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(what, got=f"{path}: {reason}", expected="a readable file", do="check the path") from error
    if not regular:
        raise UserError(what, got=f"{path}, which is no regular file", expected="a file", do="copy it to one")
    if len(content) > limit:
        raise UserError(
            what, got=f"{path} of more than {limit:,} bytes", expected="a smaller file", do="check the path"
        )
    return content


def read_text(path: str | os.PathLike, what: str, limit: int = MAX_BYTES) -> str:
    """Contents of a UTF-8 file, without a byte order mark; otherwise as `read_bytes`."""
    try:
        return read_bytes(path, what, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(what, got=f"{path} ({error})", expected="UTF-8 text", do="convert it") from error


def read_json(path: str | os.PathLike, what: str, kind: type = dict, nan: str = "refused") -> Any:
    """The value of a JSON file.

    Args:
      path: of the file.
      what: it is, for the message.
      kind: type that the value has to have.
      nan: see `parse_json`; diffusers writes infinities into its schedulers' configurations.

    Raises:
      UserError: a file that `read_text` refuses, other than JSON, or a value of another type.
    """
    return parse_json(read_text(path, what, MAX_JSON_BYTES), f"{what} {path}", kind, nan)


def parse_json(text: str | bytes, where: str, kind: type = dict, nan: str = "refused") -> Any:
    """The value of JSON text: names of an object are unique, nesting and digits within what Python reads.

    Args:
      text: of the value.
      where: it stands, for the message.
      kind: type that the value has to have.
      nan: what becomes of NaN and infinities, which Python and pandas write: refused | null | kept.

    Raises:
      UserError: other than JSON, or a value of another type; `where` names it.
    """
    name = {dict: "object", list: "array"}.get(kind, kind.__name__)
    try:
        value = json.loads(text, parse_constant=CONSTANTS[nan], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # also: other encodings, numbers of thousands of digits
        raise UserError(where, got=f"no JSON ({error})", expected=f"a JSON {name}", do="correct it") from error
    if not isinstance(value, kind):
        raise UserError(where, got=f"JSON of type {type(value).__name__}", expected=f"a JSON {name}", do="correct it")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


CONSTANTS = {"refused": _no_constant, "null": lambda name: None, "kept": float}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        (twice, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return value


def inside(directory: str | os.PathLike, name: object, what: str) -> pathlib.Path:
    """The path of a file that a directory's own index or configuration names.

    Links stay allowed: a snapshot of the Hugging Face hub consists of links into its own store.

    Args:
      directory: that the file has to be in.
      name: relative to it.
      what: names the file, for the message.

    Raises:
      UserError: an absolute name, one that leaves the directory, or no name.
    """
    good = isinstance(name, str) and name.strip() and "\0" not in name
    good = good and all(
        len(part.encode("utf-8", "replace")) < 256 for part in name.split("/")
    )  # as file systems have it
    relative = pathlib.PurePath(os.path.normpath(name) if good else "..")
    if relative.is_absolute() or ".." in relative.parts:
        raise UserError(what, got=repr(name)[:300], expected=f"the name of a file in {directory}", do="correct it")
    return pathlib.Path(directory) / relative


def output_file(path: str | os.PathLike, what: str = "output", suffixes: Sequence[str] = ()) -> pathlib.Path:
    """The path of a file to be written, behind links.

    Args:
      path: of a regular file, or of nothing so far.
      what: names it, for the message.
      suffixes: that it may have, in lower case; none: any.

    Raises:
      UserError: no name, another suffix, or something other than a regular file (a device, pipe or directory).
    """
    name = os.fspath(path)
    if not name.strip() or "\0" in name:
        raise UserError(what, got=repr(name), expected="the name of a file", do="name one")
    if suffixes and pathlib.PurePath(name).suffix.lower() not in suffixes:
        raise UserError(what, got=name, expected=f"a file name that ends in {' or '.join(suffixes)}", do="change it")
    given = pathlib.Path(os.path.expanduser(name))
    place = pathlib.Path(os.path.realpath(given)) if given.is_symlink() else given
    if os.path.lexists(place) and not place.is_file():
        raise UserError(what, got=f"{name}, which is no regular file", expected="a file", do="choose another name")
    return place


def contained(directory: str | os.PathLike, path: str | os.PathLike, what: str) -> pathlib.Path:
    """A path below a directory that no link leads out of it, but into the store of the Hugging Face hub.

    Raises:
      UserError: it lies elsewhere.
    """
    root, place = pathlib.Path(directory).resolve(), pathlib.Path(path).resolve()
    in_store = place.parent.name == "blobs" and place.parent.parent.name.startswith("models--")
    if not place.is_relative_to(root) and not in_store:
        raise UserError(what, got=f"{path}, a link to {place}", expected=f"a file in {directory}", do="copy it there")
    return pathlib.Path(path)


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file that appears complete or not at all; text as UTF-8.

    Raises:
      UserError: `path` is something other than a regular file.
    """
    path = output_file(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def append_line(path: str | os.PathLike, line: str) -> None:
    """Appends one line in one write, after whatever a killed process left of its last one; processes take turns.

    Raises:
      UserError: it cannot be written whole, or `path` is something other than a regular file.
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
    """Holds a file against other processes, where the system and the file system can."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl  # Unix alone

        fcntl.flock(file, fcntl.LOCK_EX)  # given back when the file is closed
    yield


@contextlib.contextmanager
def writable(directory: pathlib.Path) -> Iterator[None]:
    """A block with a directory that can be written; what was made for it goes away again if nothing was put there.

    Raises:
      UserError: it cannot be made or written.
    """
    made: list[pathlib.Path] = []
    try:
        try:
            for missing in _missing(directory):
                missing.mkdir(exist_ok=True)
                made.append(missing)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            raise unwritable(directory, error) from error
        yield
    finally:
        _remove_empty(made)


def unwritable(path: pathlib.Path, error: OSError) -> UserError:
    """What to say of a place that cannot be written."""
    reason = error.strerror or str(error)
    return UserError("output", got=path, expected=f"a place that can be written ({reason})", do="choose another one")


def _missing(directory: pathlib.Path) -> list[pathlib.Path]:
    """The directories that have to be made, the outermost first."""
    missing = []
    while not os.path.lexists(directory):
        missing.append(directory)
        directory = directory.parent
    return missing[::-1]


def _remove_empty(directories: Sequence[pathlib.Path]) -> None:
    for directory in reversed(directories):
        with contextlib.suppress(OSError):  # something has been put there
            directory.rmdir()
