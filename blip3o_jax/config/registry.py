"""Names of what is built in, and of what stands outside the package: `name` or `package.module:attribute`.

Every table of the package is resolved here, so that a configuration extends all of them in the same way.
"""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from blip3o_jax.errors import UserError, type_of

T = TypeVar("T")


def resolve(table: Mapping[str, T], name: str, what: str, kind: type | None = None) -> T:
    """The row of a table, or what a module outside the package defines.

    Modules are found as Python finds them, and in the working directory.

    Args:
      table: name -> what is built in, or where it is, as `package.module:attribute`, imported when it is asked for.
      name: a key of `table`, or `package.module:attribute`.
      what: the name stands for, for messages, such as "reward".
      kind: of what is named; None: a class or function.

    Raises:
      UserError: an unknown name, with the nearest, or something that cannot be imported or is of another kind.
    """
    check_name(table, name, what)
    row = table.get(name, name)
    if not isinstance(row, str):
        return row
    name = row
    module, _, attribute = name.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # a module of the user's: whatever it does when it is imported
        raise UserError(
            f"{what} {name}",
            got=f"{type(error).__name__} ({' '.join(str(error).split())})",
            expected="package.module:attribute that can be imported",
            do="check the name, and that the package is installed or in the working directory",
        ) from error
    if not (callable(found) if kind is None else isinstance(found, kind)):
        expected = "a class or function" if kind is None else f"an instance of {kind.__name__}"
        raise UserError(f"{what} {name}", got=type_of(found), expected=expected, do="name one")
    return found


def make(table: Mapping[str, Callable[..., T]], name: str, what: str, options: Mapping[str, Any] | None = None) -> T:
    """What a row of a table, a class or function, makes of options; otherwise as `resolve`.

    Raises:
      UserError: as `resolve`, or options that it does not take.
    """
    found, options = resolve(table, name, what), options or {}
    check_arguments(found, f"{what} {name}", **options)
    return found(**options)


def check_arguments(function: Callable, where: str, *arguments: Any, **options: Any) -> None:
    """Raises UserError where a function does not take these arguments; `where` names it."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a builtin
        return
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        expected = f"arguments of {getattr(function, '__name__', where)}{signature}"
        raise UserError(where, got=error, expected=expected, do="correct its options") from error


def check_trusted(table: Iterable[str], name: str, named: str | None, what: str, origin: object) -> None:
    """Raises UserError where a file names code outside the package that the user has not named.

    Args:
      table: what is built in.
      name: what the file names.
      named: by the user; None: nothing.
      what: the name stands for, such as "backbone": the argument and the flag that name it.
      origin: the file or directory.
    """
    if name not in table and name != named:
        raise UserError(
            f"{origin}: its {what} {name!r} is code outside this package",
            got=f"{what} {named!r}" if named else f"no {what} named",
            expected="you to name what is to be imported",
            do=f"pass {what}={name} (--{what} on a command line) if you trust it",
        )


def check_name(table: Iterable[str], name: str, what: str) -> None:
    """Raises UserError for a name that is neither in the table nor of the form `package.module:attribute`."""
    module, colon, attribute = name.partition(":")
    dotted = [part.isidentifier() for path in (module, attribute) for part in path.split(".")]
    if name not in table and not (colon and all(dotted)):
        near = difflib.get_close_matches(name, list(table), 1)
        hint = f"did you mean {near[0]}?" if near else "choose one, or write package.module:attribute for your own"
        raise UserError(what, got=repr(name), expected=f"one of {', '.join(sorted(table))}", do=hint)
