"""What all command lines of the package share."""

import argparse
import difflib
import reprlib
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

from blip3o_jax.config import schema
from blip3o_jax.errors import UserError

MAY_BE_EMPTY = ("prompt", "negative_prompt")


class Parser(argparse.ArgumentParser):
    """One line for a mistake, with the nearest flag; flags are written in full; `--debug` anywhere.

    Only a text of MAY_BE_EMPTY may be empty: an empty name would be taken for the working directory, or for none given.

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

    def _get_value(self, action: argparse.Action, arg_string: str):
        words_of_a_subcommand = isinstance(action, argparse._SubParsersAction)
        if not arg_string.strip() and action.dest not in MAY_BE_EMPTY and not words_of_a_subcommand:
            raise argparse.ArgumentError(action, f"got {arg_string!r} - expected a value")
        return super()._get_value(action, arg_string)

    def error(self, message: str):
        flags = sorted(self._all_flags())
        words = [word.split("=")[0].rstrip(":,") for word in (*message.split(), *self._given)]
        unknown = [word for word in dict.fromkeys(words) if word[:2] == "--" != word and word not in flags]
        near = [_nearest(word, flags) for word in unknown]
        hints = [f"did you mean {names[0]}?" for names in near if names]
        print(f"error: {' '.join(message.split())} - {' '.join(hints) or 'see --help'}", file=sys.stderr)
        sys.exit(2)

    def _all_flags(self) -> set[str]:
        """Flags of this command and of those below it."""
        subcommands = (action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction))
        below = (command._all_flags() for commands in subcommands for command in commands.values())
        return set(self._option_string_actions).union(*below)


def _nearest(word: str, flags: Sequence[str]) -> list[str]:
    return [flag for flag in flags if flag.startswith(word)] or difflib.get_close_matches(word, flags, 1)


BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def value_of(hint: Any, text: str, where: str) -> Any:
    """The value that text stands for in a configuration field of type `hint`.

    Raises:
      UserError: text that stands for none, or a value out of range; `where` names it.
    """
    base = hint
    while typing.get_args(base):  # Annotated[int, ...] or int | None
        base = typing.get_args(base)[0]
    text = text.removesuffix(".0") if base is int else text  # spreadsheets write whole numbers so
    try:
        value = BOOLEANS[text.lower()] if base is bool else base(text)
    except (KeyError, ValueError) as error:
        raise UserError(where, got=reprlib.repr(text), expected=base.__name__, do="correct it") from error
    return schema.convert_value(hint, value, where)


def of(hint: Any) -> Callable[[str], Any]:
    """The type of a flag whose values are those of a configuration field of type `hint`."""

    def parse(text: str) -> Any:
        try:
            return value_of(hint, text, "")
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from error

    return parse


seed = of(schema.Seed)
