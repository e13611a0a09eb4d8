"""Conversion rules: which PyTorch tensor becomes which leaf of the parameter tree, and with which transform.

A table is a tuple of `Rule`s in any order; a tensor must match at most one rule. `{name}` in a pattern matches
digits. A placeholder of the source that the target lacks indexes the stacked leading axis of the leaf (`nn.scan`).

Dimensions: O output and I input channels, H W kernel rows and columns, C channels, G groups of equal input and output
width.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
    """A reordering of elements between a PyTorch tensor and a leaf.

    `source_axes` is, for every dimension of the leaf, the tensor dimension that a window of the leaf selects from, in
    blocks of `tensor size / leaf size`; None where the whole tensor dimension must be read. Default: the same one.
    """

    forward: Callable[[np.ndarray], np.ndarray]  # released layout -> native layout
    inverse: Callable[[np.ndarray], np.ndarray]  # native layout -> released layout; `inverse(forward(x))` is `x`
    source_axes: tuple[int | None, ...] | None = None


def _group(x: np.ndarray) -> np.ndarray:
    rows, width = x.shape[:2]
    return x.reshape(rows // width, width, width).transpose(0, 2, 1)


TRANSFORMS: dict[str, Transform] = {
    "identity": Transform(lambda x: x, lambda x: x),
    # [O I] -> [I O]
    "linear": Transform(lambda x: x.transpose(1, 0), lambda x: x.transpose(1, 0), (1, 0)),
    # [O I H W] -> [H W I O]
    "conv": Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1), (2, 3, 1, 0)),
    # [O I 1 1] -> [I O]
    "pointwise": Transform(
        lambda x: x.reshape(x.shape[0], x.shape[1]).transpose(1, 0),
        lambda x: x.transpose(1, 0)[:, :, None, None],
        (1, 0),
    ),
    # [C 1 H W] -> [H W C]
    "depthwise": Transform(
        lambda x: x.reshape(x.shape[0], *x.shape[2:]).transpose(1, 2, 0),
        lambda x: x.transpose(2, 0, 1)[:, None],
        (2, 3, 0),
    ),
    # [G*O I 1 1], O = I -> [G I O]
    "grouped": Transform(
        _group,
        lambda x: x.transpose(0, 2, 1).reshape(x.shape[0] * x.shape[2], x.shape[1], 1, 1),
        (0, None, None),
    ),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """A family of PyTorch tensors and the leaves that they fill."""

    source: str  # tensor name relative to the part's prefix, such as `layers.{i}.mlp.up_proj.weight`
    target: str  # leaf path relative to the part's subtree, such as `layers/mlp/up/kernel`
    transform: str  # a key of `TRANSFORMS`
    surplus: str | None = None  # why stack indices beyond the depth of the leaf are unused; None: an error

    def __post_init__(self):
        extra = set(placeholders(self.target)) - set(placeholders(self.source))
        assert self.transform in TRANSFORMS, f"{self}: unknown transform"
        assert not extra, f"{self}: {sorted(extra)} of the target are not in the source"
        assert len(self.stack_names) <= 1, f"{self}: more than one stacked axis"

    @property
    def stack_names(self) -> tuple[str, ...]:
        """The placeholder that indexes the leading axis of the leaf, if any."""
        return tuple(name for name in placeholders(self.source) if name not in placeholders(self.target))

    def match(self, key: str) -> dict[str, int] | None:
        """Returns the values of the placeholders, or None if the rule does not match the tensor name `key`."""
        found = pattern(self.source).fullmatch(key)
        return {name: int(value) for name, value in found.groupdict().items()} if found else None


def rules(table: str, source: str = "", target: str = "", surplus: str | None = None) -> tuple[Rule, ...]:
    """Parses a table with one layer per line: kind, PyTorch name, native name.

    A kind is a transform, with `+bias` for layers with a bias; `scale` for norms; `tensor` for complete tensor names.

    Args:
      source: prefix of all PyTorch names.
      target: prefix of all native names.
      surplus: see `Rule`; applies to all rules.
    """
    found = []
    for line in table.strip().splitlines():
        kind, theirs, ours = line.split()
        kind, _, bias = kind.partition("+")
        transform, end = {"tensor": ("identity", ""), "scale": ("identity", "/scale")}.get(kind, (kind, "/kernel"))
        weight = "" if kind == "tensor" else ".weight"
        found.append(Rule(f"{source}{theirs}{weight}", f"{target}{ours}{end}", transform, surplus))
        if bias:
            found.append(Rule(f"{source}{theirs}.bias", f"{target}{ours}/bias", "identity", surplus))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Unused:
    """PyTorch tensors that the model never uses."""

    source: str  # regular expression for the complete name, relative to the part's prefix
    reason: str  # why they are unused, for reports


@functools.cache
def placeholders(text: str) -> tuple[str, ...]:
    """Returns the names in braces, in order."""
    return tuple(re.findall(r"\{(\w+)\}", text))


@functools.cache
def pattern(text: str) -> re.Pattern:
    """Returns the regular expression in which every placeholder is a named group of digits."""
    pieces = re.split(r"\{(\w+)\}", text)
    return re.compile(
        "".join(re.escape(piece) if i % 2 == 0 else rf"(?P<{piece}>\d+)" for i, piece in enumerate(pieces))
    )
