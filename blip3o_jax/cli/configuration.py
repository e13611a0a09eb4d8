"""Reads `--config=FILE[:ARGUMENT]` with overrides `--config.SECTION.KEY=VALUE`, for all command lines.

A file is JSON, or Python with a function `get_config`. An optional function `complete` of the nested values
post-processes the configuration after overrides; an optional table `FLAGS`, setting -> KEY=VALUE, says which override
gives a setting that `complete` fills in. Configurations of the package are found by name from any directory:
`configs/tiny.py:pretrain`, `tiny.py` and `tiny` name the same file unless a file of that path exists. An override is
converted to the type of the value it replaces; `None` unsets a key; missing sections are created; `NAME.0.KEY` and
`NAME[0].KEY` index tuples. Unknown keys are refused when the configuration is read.
"""

import argparse
import ast
import contextlib
import importlib.util
import inspect
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from blip3o_jax.command_line import BOOLEANS, Parser
from blip3o_jax.errors import UserError, require
from blip3o_jax.files import read_bytes, read_json

HELP = "configuration: NAME.py[:ARGUMENT] or a .json file; override values with --config.SECTION.KEY=VALUE"
_PACKAGE = pathlib.Path(__file__).parents[1]
BUILT_IN = next(path for path in (_PACKAGE.parent / "configs", _PACKAGE / "configs") if (path / "common.py").is_file())


def parse(parser: Parser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses a command line; the attribute `changes` of the result holds the overrides, for `read`."""
    words, changes = split(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(words)
    if changes and "config" not in args:
        parser.error(f"unrecognized arguments: --config.{changes[0]}")
    args.changes = changes
    return args


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates overrides from the other arguments of a command line.

    Args:
      words: the arguments; overrides are `--config.KEY=VALUE`, `--config.KEY VALUE`, or for booleans `--config.KEY` and
        `--noconfig.KEY`.

    Returns:
      The other arguments, and the overrides as KEY=VALUE.
    """
    others, changes, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        flag, given, value = word.partition("=")
        if word == "--":
            others += [word, *rest]
            rest = []
        elif flag.startswith("--noconfig.") and not given:
            changes.append(f"{flag.removeprefix('--noconfig.')}=false")
        elif flag.startswith("--config."):
            if not given:
                value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
            changes.append(f"{flag.removeprefix('--config.')}={value}")
        else:
            others.append(word)
    return others, changes


def read(name: str, changes: Sequence[str] = (), with_paths: bool = False) -> dict[str, Any]:
    """Reads a configuration as plain nested values.

    Args:
      name: FILE[:ARGUMENT].
      changes: overrides of `split`, applied in order.
      with_paths: refuse data sources whose path is not set.

    Raises:
      UserError: a missing or failing file, a file that is not a configuration, or an override that does not fit.
    """
    config, module = _load(name)
    for change in changes:
        path, _, text = change.partition("=")
        parts = re.sub(r"\[(\d+)\]", r".\1", path).split(".")
        require(all(parts), f"--config.{path}", "an empty name", "SECTION.KEY", "correct it")
        config = _changed(config, parts, text, f"--config.{path}")
    complete = getattr(module, "complete", lambda config: config)
    config = complete(config.to_dict() if isinstance(config, ConfigDict) else config)
    if with_paths:
        _check_paths(config, getattr(module, "FLAGS", {}))
    return config


def _check_paths(config: dict[str, Any], flags: Mapping[str, str]) -> None:
    """Raises UserError for a data source whose path is not set; names the override that sets it."""
    data = config.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    found: dict[str, Any] = {}
    if isinstance(sources, dict):
        found = {f"data.sources.{name}.path": source for name, source in sources.items()}
    elif isinstance(sources, (list, tuple)):
        found = {f"data.sources[{i}].path": source for i, source in enumerate(sources)}
    for setting, source in found.items():
        missing = isinstance(source, dict) and source.get("path", "") is None
        flag = flags.get(setting, f"{setting}=PATH")
        require(not missing, f"{setting}: not set", None, "the path of the data", f"add --config.{flag}")


def _load(name: str) -> tuple[ConfigDict | dict, types.ModuleType | None]:
    """Returns the configuration and the module of its file, None for JSON."""
    file, _, argument = name.partition(":")
    path = _find(file)
    if path.suffix == ".json":
        return read_json(path, "--config"), None
    require(path.suffix == ".py", "--config", file, "a .py or .json file", "rename it")
    read_bytes(path, "--config")  # refuses other than a regular file
    try:
        module = _import(path)
        get_config = getattr(module, "get_config", None)
        require(get_config is not None, f"--config {file}: no get_config", None, "a function that returns it", "add it")
        if argument and not inspect.signature(get_config).parameters:
            raise UserError("--config", got=name, expected=f"{file} alone: it takes no argument", do="leave it out")
        config = get_config(argument) if argument else get_config()
    except UserError:
        raise
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        if isinstance(error, SyntaxError):
            place, reason = f"{pathlib.Path(error.filename or path).name}:{error.lineno}", error.msg
        else:
            place, reason = f"line {lines[-1]}" if lines else path.name, error
        got = f"{type(error).__name__}: {reason} ({place})"
        raise UserError(f"--config {file}", got=got, expected="a file that runs", do="correct it") from error
    if not isinstance(config, (dict, ConfigDict)):
        raise UserError(
            f"--config {file}: get_config",
            got=type(config).__name__,
            expected="a ConfigDict or dictionary",
            do="return one",
        )
    if isinstance(config, ConfigDict):
        config.unlock()
    return config, module


def _find(file: str) -> pathlib.Path:
    """Returns the path of a configuration, given as a path or as the name of a built-in one."""
    path, name = pathlib.Path(file).expanduser(), pathlib.PurePath(file)
    own = BUILT_IN / name.with_suffix(".py").name if name.name else BUILT_IN
    if not path.exists() and str(name.parent) in (".", "configs") and name.suffix in ("", ".py") and own.is_file():
        return own
    if not file or not path.exists():
        known = ", ".join(sorted(path.stem for path in BUILT_IN.glob("*.py") if path.stem != "common"))
        raise UserError(
            "--config", got=f"{file or 'nothing'}: no such file", expected=f"a file, or one of {known}", do="check it"
        )
    return path.absolute()


def _import(path: pathlib.Path) -> types.ModuleType:
    """Imports a configuration file; `from configs import ...` searches its own folder, then the built-in ones."""
    package = sys.modules.setdefault("configs", types.ModuleType("configs"))
    package.__path__ = [*([str(path.parent)] if path.parent.name == "configs" else []), str(BUILT_IN)]
    if str(path.parent.parent) not in sys.path:
        sys.path.append(str(path.parent.parent))
    spec = importlib.util.spec_from_file_location("blip3o_jax_config_file", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _changed(holder: Any, parts: list[str], text: str, where: str) -> Any:
    """Returns `holder` with the value at `parts` replaced; mappings are modified in place."""
    part, *rest = parts
    if isinstance(holder, (list, tuple)):
        if not part.isdecimal() or int(part) >= len(holder):
            raise UserError(
                where, got=f"index {part!r}", expected=f"0 to {len(holder) - 1}" if holder else "no index", do="fix it"
            )
        items = list(holder)
        old = items[int(part)]
        items[int(part)] = _value(type(old), old, rest, text, where)
        return type(holder)(items)
    if not isinstance(holder, (dict, ConfigDict)):
        raise UserError(where, got=f"{part!r} within the value {holder!r}", expected="a section", do="correct the key")
    old = holder.get(part)
    if isinstance(holder, ConfigDict):
        kind = holder.get_type(part) if part in holder else type(None)
        with holder.ignore_type():
            holder[part] = _value(kind, old, rest, text, where)
    else:  # JSON: whether a number is an int or a float is unknown
        kind = type(old) if isinstance(old, (str, bool, dict, list)) else type(None)
        holder[part] = _value(kind, old, rest, text, where)
    return holder


def _value(kind: type, old: Any, rest: list[str], text: str, where: str) -> Any:
    """Returns `old` with the value at `rest` replaced, or `text` as a value of type `kind` if nothing is left."""
    if rest:
        return _changed({} if old is None else old, rest, text, where)
    if text == "None":
        return None
    if kind is str:
        return text
    lowered, literal = text.lower(), text
    if lowered in ("true", "false"):
        literal = BOOLEANS[lowered]
    else:
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            literal = ast.literal_eval(text)
    if kind in (tuple, list):
        return kind(literal if isinstance(literal, (tuple, list)) else (literal,))
    good, name = literal, kind.__name__
    if kind is bool:
        good = BOOLEANS.get(lowered)
    elif kind is int:
        good = literal if type(literal) is int else None
    elif kind is float:
        good = None
        with contextlib.suppress(ValueError):
            good = float(text)
    elif issubclass(kind, (dict, ConfigDict)):
        sections = literal if isinstance(literal, (tuple, list)) else (literal,)  # of data.sources: named, or in order
        fits = bool(sections) and all(isinstance(section, dict) for section in sections)
        good, name = literal if fits else None, "a dictionary, a tuple of dictionaries"
    require(good is not None, where, repr(text), f"{name}, or None", "change it")
    return good
