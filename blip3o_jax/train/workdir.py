"""The working directory of a run: belongs to one configuration, and is used by one run at a time."""

import contextlib
import fcntl
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax

from blip3o_jax.errors import UserError, require
from blip3o_jax.files import read_json, write_whole
from blip3o_jax.train import distributed

# Patterns of dotted settings that a resumed run may change: monitoring, parallelism, duration, locations.
MAY_CHANGE = (
    r"^mesh\b",
    r"^loop\.(?!seed$)",
    r"^samples\b",
    r"^export_(every|ema)$",
    r"^numerics\.remat$",
    r"^optimizer\.(accumulation|max_skipped)$",
    r"^((validation|rl\.held_out)\.)?data\.(num_threads|num_workers|prefetch|max_broken_share)$",
    r"^data\.sources\b.*\.path$",  # moved data; the source checks their identity
    r"^data\.sources\b.*\.options\.[^.]*_dir$",  # likewise
    r"^rl\.(guards|groups_every)\b",
    r"^((validation|score|rl\.held_out)\.every|rl\.held_out\.max_drop)$",
    r"^rl\.(held_out\.)?rewards\.\d+\.(timeout|options\.(url|timeout|retries|batch_size))$",  # access to a service
    r"^(init_from|reference_from|tokenizer)$",  # moved files; `started_from` records their identity
)
UNLESS_RANKED = r"^(validation|score)\b"  # unless loop.keep_best compares later scores with earlier ones
MAY_BE_ADDED = r"^(validation|score|rl\.held_out)(?=\.|$)"  # evaluations, to a run that has none of that name
LATER = ("started_from.tokenizer", "model.dit.name")  # settings that earlier versions did not record


@contextlib.contextmanager
def claimed(workdir: str, settings: dict[str, Any], facts: dict[str, Any]) -> Iterator[None]:
    """Locks `workdir` for this run and records its configuration; to be called by all processes.

    Args:
      settings: resolved configuration, nested and JSON-serialisable.
      facts: further entries of `config.json`, such as the version.

    Raises:
      UserError: the directory belongs to another configuration, is in use, or cannot be written.
    """
    with contextlib.ExitStack() as stack:
        error = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(_locked(workdir))
                record_settings(workdir, settings, facts)
            except UserError as raised:
                error = raised
        distributed.raise_together(f"workdir {workdir}", error)
        yield


def record_settings(workdir: str, settings: dict[str, Any], facts: dict[str, Any]) -> None:
    """Writes `config.json`; raises UserError if an existing one differs in more than MAY_CHANGE allows."""
    settings = json.loads(json.dumps(settings))
    with _writable(workdir) as directory:
        path = directory / "config.json"
        if path.exists():
            known = read_json(path, "workdir").get("config")
            require(isinstance(known, dict), path, "no configuration", "one written by this program", "remove it")
            _compare(path, flat(known), flat(settings))
        write_whole(path, json.dumps({"config": settings, **facts}, indent=2) + "\n")


@contextlib.contextmanager
def _writable(workdir: str) -> Iterator[pathlib.Path]:
    """Creates the directory; raises UserError for a failure to write to it."""
    require("://" not in str(workdir), "workdir", workdir, "a local directory", "mount the bucket and give its path")
    directory = pathlib.Path(workdir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
    except OSError as error:
        what = f"workdir {workdir}: {error.strerror}"
        raise UserError(what, expected="a writable directory", do="choose another") from error


@contextlib.contextmanager
def _locked(workdir: str) -> Iterator[None]:
    """Locks `workdir` against a second process; the lock of a killed process is released."""
    with _writable(workdir) as directory:
        file = open(directory / ".lock", "a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"workdir {workdir}: process {file.read().strip() or 'unknown'} is training here",
                expected="a free directory",
                do="wait for it, stop it, or choose another directory",
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Returns dotted name -> value of nested settings; sections in a list are numbered."""
    if isinstance(settings, list) and settings and all(isinstance(item, dict) for item in settings):
        settings = dict(enumerate(settings))
    if not isinstance(settings, dict):
        return {prefix: settings}
    items = [flat(value, f"{prefix}.{key}" if prefix else str(key)).items() for key, value in settings.items()]
    return {name: value for part in items for name, value in part}


def _compare(path: pathlib.Path, known: dict[str, Any], given: dict[str, Any]) -> None:
    absent = object()
    names = [name for name in {**known, **given} if known.get(name, absent) != given.get(name, absent)]
    ranked = known.get("loop.keep_best") and given.get("loop.keep_best")
    patterns = MAY_CHANGE if ranked else (*MAY_CHANGE, UNLESS_RANKED)
    names = [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]
    names = [name for name in names if not _added(name, known)]
    names = [name for name in names if name in known or name not in LATER]
    if names:
        pairs = [[repr(values[name]) if name in values else "unset" for values in (given, known)] for name in names]
        shown = ", ".join(f"{name} = {now} (recorded {before})" for name, (now, before) in list(zip(names, pairs))[:3])
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(
            f"workdir {path.parent}: belongs to another configuration",
            got=f"{shown}{more}",
            expected="the recorded values",
            do="undo the change or choose another workdir",
        )


def _added(name: str, known: dict[str, Any]) -> bool:
    """Returns whether a setting is part of an evaluation that the recorded configuration lacks."""
    section = re.match(MAY_BE_ADDED, name)
    return section is not None and not any(other.startswith(f"{section[0]}.") for other in known)
