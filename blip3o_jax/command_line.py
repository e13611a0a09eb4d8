"""What all command lines of the package share."""

import argparse
import difflib
import sys
from collections.abc import Sequence


class Parser(argparse.ArgumentParser):
    """One line for a mistake, with the nearest flag; flags are written in full; `--debug` anywhere.

    Subcommands are parsers of this kind, too.
    """

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        self._given: list[str] = []
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        return super().parse_args(args, namespace or argparse.Namespace(debug=False))

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        self._given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        flags = sorted(self._all_flags())
        words = [word.split("=")[0].rstrip(":") for word in (*message.split(), *self._given)]
        unknown = [word for word in dict.fromkeys(words) if word[:2] == "--" != word and word not in flags]
        near = [_nearest(word, flags) for word in unknown]
        hints = [f"did you mean {names[0]}?" for names in near if names]
        print(f"error: {message} - {' '.join(hints) or 'see --help'}", file=sys.stderr)
        sys.exit(2)

    def _all_flags(self) -> set[str]:
        """Flags of this command and of those below it."""
        subcommands = (action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction))
        below = (command._all_flags() for commands in subcommands for command in commands.values())
        return set(self._option_string_actions).union(*below)


def _nearest(word: str, flags: Sequence[str]) -> list[str]:
    return [flag for flag in flags if flag.startswith(word)] or difflib.get_close_matches(word, flags, 1)


def seed(text: str) -> int:
    """Type of a flag: what random generators may be started with."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text} - expected a whole number of 0 or more")
    return int(text)
