"""Checksums of checkpoint files: written on save, verified on load.

A checksum is the CRC-32 of the sums of every 256 words of a file. It detects a changed word and a missing, moved or
truncated block, at memory speed (`benchmarks/loading.py`).
"""

import functools
import json
import os
import pathlib
import re
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.experimental import multihost_utils

from blip3o_jax.errors import UserError
from blip3o_jax.files import inside, read_json, write_whole

NAME = "checksums.json"
ROW = 256  # words of 8 bytes per sum
BUFFER_BYTES = 2**18


def checksum(path: str | os.PathLike) -> int:
    """Computes the checksum of a file."""
    buffer, crc = bytearray(BUFFER_BYTES), 0
    words = np.frombuffer(buffer, np.uint64).reshape(-1, ROW)
    with open(path, "rb") as file:
        while size := file.readinto(buffer):
            buffer[size:] = bytes(BUFFER_BYTES - size)
            crc = zlib.crc32(words.sum(axis=1), crc)
    return crc


def write_checksums(directory: pathlib.Path, names: Sequence[str]) -> None:
    """Writes `checksums.json` of files and of all files in folders of a directory; to be called by one process."""
    paths = [path for name in names for path in (directory / name, *(directory / name).rglob("*")) if path.is_file()]
    with ThreadPoolExecutor() as pool:
        found = zip(paths, pool.map(checksum, paths))
        table = {path.relative_to(directory).as_posix(): [path.stat().st_size, crc] for path, crc in found}
    write_whole(directory / NAME, json.dumps(table, indent=0, sort_keys=True) + "\n")


def verify(directory: pathlib.Path, name: str = "") -> None:
    """Verifies the files of a checkpoint against `checksums.json`; passes if there is none (earlier versions).

    To be called by all processes of a distributed run; each reads its share of the files.

    Args:
      name: file or folder in it to verify; default all.

    Raises:
      UserError: on every process, if a file is missing or differs.
    """
    wrong = []
    if (directory / NAME).exists():
        table = read_json(directory / NAME, "checksums")
        listed = [(inside(directory, file, NAME), entry) for file, entry in sorted(table.items())]
        listed = [(path, entry) for path, entry in listed if path.is_relative_to(directory / name)]
        share = listed[jax.process_index() :: jax.process_count()]
        with ThreadPoolExecutor() as pool:
            good = pool.map(lambda item: _state(item[0]) == item[1], share)
            wrong = [path for (path, _), same in zip(share, good) if not same]
    count = len(wrong)
    if jax.process_count() > 1:
        count = int(np.sum(multihost_utils.process_allgather(np.array(count))))
    if count:
        found = [f"{path.relative_to(directory)} {'changed' if path.is_file() else 'missing'}" for path in wrong[:3]]
        raise UserError(
            f"checkpoint {directory}: damaged",
            got=", ".join(found) or "files that other processes have read",
            expected="the files that were written",
            do="copy it again, or use another",
        )


def storage_reason(error: BaseException) -> str:
    """Returns the message of a storage library's error in one line, without object representations."""
    text = re.sub(r"<[^<>]*(?:<[^<>]*>[^<>]*)*>", "", str(error))
    text = re.sub(r"(?: \[?source locations?=.*)", "", " ".join(text.split())).strip(" :")
    code = getattr(error, "errno", None)
    text = (os.strerror(code) if code and not text else text) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-100:]}"


def _state(path: pathlib.Path) -> list[int] | None:
    if not path.is_file():
        return None
    status = path.stat()
    return [status.st_size, _known_checksum(path, status.st_size, status.st_mtime_ns)]


@functools.lru_cache(maxsize=4096)
def _known_checksum(path: pathlib.Path, size: int, changed: int) -> int:
    """Caches checksums, because the parts of a checkpoint are loaded and verified one by one."""
    del size, changed
    return checksum(path)
