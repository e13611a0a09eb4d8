"""Text files that a user hands over, files that appear whole, and directories that can be written."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

from blip3o_jax.errors import UserError


def read_text(path: pathlib.Path, what: str) -> str:
    """Contents of a UTF-8 file, without a byte order mark.

    Args:
      path: of the file.
      what: it is, for the message.

    Raises:
      UserError: it cannot be read, or is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what}: got {path} ({error}) - expected a readable UTF-8 file - correct it") from error


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Writes a file that appears complete or not at all."""
    path = pathlib.Path(path)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


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
    return UserError(f"output: got {path} - expected a place that can be written ({reason}) - choose another one")


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
