"""Command lines with a configuration: `--config=FILE`, `--config.SECTION.KEY=VALUE`, and one line for a mistake."""

import difflib
import sys
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags


def define_config() -> Any:
    """The flag `--config`. It takes keys that the file does not set: whoever reads the configuration knows them all."""
    told = "configuration, configs/NAME.py[:ARGUMENT]"
    return config_flags.DEFINE_config_file("config", None, told, lock_config=False, accept_new_attributes=True)


def parse(arguments: list[str]) -> list[str]:
    """Parses flags for `app.run(main, flags_parser=parse)`: a mistake ends in one line and exit code 2."""
    try:
        return flags.FLAGS(arguments)
    except KeyError as mistake:
        told = _missing_section(arguments) or f"--config: no key {mistake} - expected one of the configuration - fix it"
    except OSError:
        got = _files(arguments)[-1]
        told = f"--config: got {got}, which cannot be read - expected configs/NAME.py[:ARGUMENT] - check the path"
    except (flags.Error, AttributeError, TypeError, ValueError) as mistake:
        told = str(mistake).rpartition("Error: ")[2]  # a mistake within a configuration file comes with its traceback
    print(f"error: {' '.join(told.replace(chr(92) + 'n', ' ').split())}", file=sys.stderr)
    sys.exit(2)


def _missing_section(arguments: list[str]) -> str | None:
    """What to say of the first `--config.SECTION.KEY` whose section the configuration lacks; None if there is none."""
    names = [argument.partition("=")[0].removeprefix("--") for argument in arguments if argument.startswith("--")]
    files = _files(arguments)
    whole = flags.FLAGS["config"].parser.parse(files[-1]) if files else None
    for name in names:
        config = whole
        for part in name.split(".")[1:-1]:
            if not isinstance(config, ConfigDict):
                break
            if part not in config:
                near = difflib.get_close_matches(part, config, 1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(config))}"
                return f"--{name}: no section {part!r} - expected one of the configuration - {hint}"
            config = config[part]
    return None


def _files(arguments: list[str]) -> list[str]:
    """What `--config` was given, in order."""
    files = [argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")]
    return files + [after for flag, after in zip(arguments, arguments[1:], strict=False) if flag == "--config"]
