"""Paths of a parameter tree, and ordered rules over them.

A tree is nested dictionaries; the path of a leaf joins its keys: `decoder/layers/mlp/up/kernel`. Rules are an ordered
sequence of (regular expression, value): the first expression found in a path determines its value, and every leaf must
match one. Rules select trainable leaves, weight decay and learning rates.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from flax import traverse_util

from blip3o_jax.errors import UserError

Tree = Mapping[str, Any]
Value = TypeVar("Value")
Rules = Sequence[tuple[str, Value]]


class Expression:
    """Requires a configuration field to be a regular expression."""

    def check(self, value: str, where: str) -> None:
        _compile(value, where)


def flatten(tree: Tree) -> dict[str, Any]:
    """Returns path -> leaf in tree order; annotated (boxed) leaves are kept as they are."""
    return {"/".join(map(str, keys)): leaf for keys, leaf in traverse_util.flatten_dict(dict(tree)).items()}


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Inverts `flatten`."""
    return traverse_util.unflatten_dict({tuple(path.split("/")): leaf for path, leaf in leaves.items()})


def map_with_path(function: Callable[[str, Any], Any], tree: Tree) -> dict[str, Any]:
    """Returns the tree of `function(path, leaf)`."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def match(tree: Tree, rules: Rules, what: str) -> dict[str, Any]:
    """Returns the tree of the values that `rules` assign to the leaves of `tree`.

    Raises:
      UserError: a leaf that no rule matches, or an invalid regular expression.
    """
    compiled = [(_compile(pattern, what), value) for pattern, value in rules]

    def first(path: str, leaf: Any) -> Any:
        for pattern, value in compiled:
            if pattern.search(path):
                return value
        expected = f"to match one of the rules [{', '.join(pattern for pattern, _ in rules)}]"
        raise UserError(f"{what}: parameter {path}", expected=expected, do="add a rule for it")

    return map_with_path(first, tree)


def partition(tree: Tree, rules: Rules) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a tree into its trainable and its frozen leaves, by rules of bool; `merge` joins them again.

    Raises:
      UserError: a leaf that no rule matches.
    """
    trains, leaves = flatten(match(tree, rules, "trainable")), flatten(tree)
    trainable, frozen = (
        unflatten({path: leaf for path, leaf in leaves.items() if trains[path] is wanted}) for wanted in (True, False)
    )
    return trainable, frozen


def merge(*trees: Tree) -> dict[str, Any]:
    """Joins trees with disjoint leaves."""
    leaves: dict[str, Any] = {}
    for tree in trees:
        part = flatten(tree)
        twice = leaves.keys() & part.keys()
        assert not twice, f"leaves in two trees: {sorted(twice)}"
        leaves.update(part)
    return unflatten(leaves)


def _compile(pattern: str, what: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(what, got=repr(pattern), expected=f"a regular expression ({error})", do="correct it") from error
