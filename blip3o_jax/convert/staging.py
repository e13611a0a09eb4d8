"""Writes directories atomically."""

import contextlib
import pathlib
import shutil
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from blip3o_jax.errors import UserError, require
from blip3o_jax.files import writable


def check_space(directory: pathlib.Path, size: int) -> None:
    """Raises UserError if the file system of a directory has less than `size` bytes free."""
    free = shutil.disk_usage(directory).free
    require(size <= free, f"{directory}: free space", f"{free / 1e6:,.0f} MB", f"{size / 1e6:,.0f} MB", "free some")


def check_target(target: pathlib.Path) -> None:
    """Raises UserError if `target` is neither new nor an empty directory, or its parent cannot be written."""
    _check_new(target)
    with writable(target.parent):
        pass


@contextlib.contextmanager
def staged_directory(target: pathlib.Path, replace: bool = False) -> Iterator[pathlib.Path]:
    """Yields an empty directory that is renamed to `target` on success and deleted on failure.

    To be entered by all processes of a distributed run; the first one creates and renames the directory. With
    `replace`, an existing directory is replaced once the new one is complete.

    Raises:
      UserError: `target` exists and is not an empty directory, or its parent cannot be written.
    """
    first = jax.process_index() == 0
    if not replace:
        _check_new(target)
    staging = target.with_name(f".{target.name}.partial")
    if first:
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{target}: {error.strerror}", expected="a place to write", do="choose another") from None
    _barrier(f"made {staging}")
    try:
        yield staging
    except BaseException:
        if first:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    _barrier(f"wrote {staging}")
    if first:
        before = target.with_name(f".{target.name}.before")
        shutil.rmtree(before, ignore_errors=True)
        if target.exists():
            target.rename(before)
        staging.rename(target)
        shutil.rmtree(before, ignore_errors=True)
    _barrier(f"renamed {staging}")


def _check_new(target: pathlib.Path) -> None:
    if target.name in ("", ".."):
        raise UserError(f"{target}: not the name of a directory", expected="a new one", do="write such as ./model")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: exists already", expected="a new directory", do="choose another or delete it")


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
