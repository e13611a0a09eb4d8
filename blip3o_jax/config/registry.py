"""Resolves names: a row of a table of built-in choices, or `package.module:attribute` from outside the package.

All tables of the package are resolved here, so that all of them are extended in the same way.
"""

import functools
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from blip3o_jax.errors import UserError, call_custom, nearest, type_of

T = TypeVar("T")


def resolve(table: Mapping[str, T], name: str, what: str, kind: type | None = None) -> T:
    """Returns the object that a name stands for.

    Modules are found on the Python path and in the working directory.

    Args:
      table: name -> object, or `package.module:attribute` to import it from.
      what: kind of object for messages, such as "reward".
      kind: required class of the object; None: a class or function.

    Raises:
      UserError: an unknown name (the nearest is suggested), a failed import, or an object of another kind.
    """
    check_name(table, name, what)
    row = table.get(name, name)
    if not isinstance(row, str):
        return row
    name = row
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        found = pkgutil.resolve_name(name)
    except (Exception, SystemExit) as error:  # user code may raise anything on import
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
    """Calls the class or function that a name stands for with options; otherwise as `resolve`.

    Raises:
      UserError: as `resolve`, options that it does not accept, or whatever one from outside the package raises.
    """
    found, options = resolve(table, name, what), options or {}
    check_arguments(found, f"{what} {name}", **options)
    called = functools.partial(found, **options)
    return called() if name in table else call_custom(f"{what} {name}", called)


def check_arguments(function: Callable, where: str, *arguments: Any, **options: Any) -> None:
    """Raises UserError if a function does not accept the arguments; `where` names it."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # builtins have none
        return
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        expected = f"arguments of {getattr(function, '__name__', where)}{signature}"
        raise UserError(f"{where}: {error}", expected=expected, do="correct its options") from error


def check_trusted(table: Iterable[str], name: str, named: str | None, what: str, origin: object) -> None:
    """Raises UserError if a file names code outside the package that the user has not named.

    Args:
      name: name in the file.
      named: name given by the user; None if none.
      what: kind of object such as "backbone", also the argument and flag that name it.
    """
    if name not in table and name != named:
        raise UserError(
            f"{origin}: its {what} {name!r} is code outside this package",
            got=f"{what} {named!r}" if named else f"no {what} named",
            expected="you to name what is to be imported",
            do=f"pass {what}={name} (--{what} on a command line) if you trust it",
        )


def check_name(table: Iterable[str], name: str, what: str) -> None:
    """Raises UserError if a name is neither in the table nor of the form `package.module:attribute`."""
    module, colon, attribute = name.partition(":")
    dotted = [part.isidentifier() for path in (module, attribute) for part in path.split(".")]
    if name not in table and not (colon and all(dotted)):
        do = nearest(name, table, "choose one, or write package.module:attribute for your own")
        raise UserError(what, got=repr(name), expected=f"one of {', '.join(sorted(table))}", do=do)
