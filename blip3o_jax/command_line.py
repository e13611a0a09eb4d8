"""The argument parser of all command lines, and parsing of values by the types of configuration fields."""

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
    """An argument parser that reports mistakes in one line with the nearest flag, and accepts `--debug` anywhere.

    Flags cannot be abbreviated. Values other than MAY_BE_EMPTY must not be empty: an empty name would mean the working
    directory or no value. Subcommands are parsers of the same class.
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
        near = [
            [flag for flag in flags if flag.startswith(word)]
            or difflib.get_close_matches(word, flags, 1, 0.8)
            or [flag for flag in flags if word.lstrip("-") in flag.split("_")]  # --steps: --num_inference_steps
            or difflib.get_close_matches(word, flags, 1)
            for word in unknown
        ]
        hints = [f"did you mean {names[0]}?" for names in near if names]
        print(f"error: {' '.join(message.split())} - {' '.join(hints) or 'see --help'}", file=sys.stderr)
        sys.exit(2)

    def _all_flags(self) -> set[str]:
        """Returns the flags of this command and of its subcommands."""
        subcommands = (action.choices for action in self._actions if isinstance(action, argparse._SubParsersAction))
        below = (command._all_flags() for commands in subcommands for command in commands.values())
        return set(self._option_string_actions).union(*below)


BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def value_of(hint: Any, text: str, where: str) -> Any:
    """Parses text as a value of a configuration field of type `hint`.

    Raises:
      UserError: the text is not such a value, or it is out of range; `where` names it.
    """
    base = hint
    while typing.get_args(base):  # Annotated[int, ...] or int | None
        base = typing.get_args(base)[0]
    text = text.removesuffix(".0") if base is int else text  # as spreadsheets write integers
    try:
        value = BOOLEANS[text.lower()] if base is bool else base(text)
    except (KeyError, ValueError) as error:
        raise UserError(where, got=reprlib.repr(text), expected=base.__name__, do="correct it") from error
    return schema.convert_value(hint, value, where)


def of(hint: Any) -> Callable[[str], Any]:
    """Returns the `type` of a flag that takes the values of a configuration field of type `hint`."""

    def parse(text: str) -> Any:
        try:
            return value_of(hint, text, "")
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from error

    return parse


seed = of(schema.Seed)
