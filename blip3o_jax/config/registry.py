"""Names of what is built in, and of what stands outside the package: `name` or `package.module:attribute`.

Every table of the package is resolved here, so that a configuration extends all of them in the same way.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Iterable, Mapping
from typing import TypeVar

from blip3o_jax.errors import UserError

T = TypeVar("T")


def resolve(table: Mapping[str, T], name: str, what: str) -> T:
    """The row of a table, or what a module outside the package defines.

    Modules are found as Python finds them, and in the working directory.

    Args:
      table: name -> what is built in.
      name: a key of `table`, or `package.module:attribute`.
      what: the name stands for, for messages, such as "reward".

    Raises:
      UserError: an unknown name, with the nearest, or something that cannot be imported.
    """
    check_name(table, name, what)
    if name in table:
        return table[name]
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
    if not callable(found):
        raise UserError(
            f"{what} {name}", got=f"a {type(found).__name__}", expected="a class or function", do="name one"
        )
    return found


def check_name(table: Iterable[str], name: str, what: str) -> None:
    """Raises UserError for a name that is neither in the table nor of the form `package.module:attribute`."""
    module, colon, attribute = name.partition(":")
    dotted = [part.isidentifier() for path in (module, attribute) for part in path.split(".")]
    if name not in table and not (colon and all(dotted)):
        near = difflib.get_close_matches(name, list(table), 1)
        hint = f"did you mean {near[0]}?" if near else "choose one, or write package.module:attribute for your own"
        raise UserError(what, got=repr(name), expected=f"one of {', '.join(sorted(table))}", do=hint)
