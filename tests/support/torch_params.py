"""Parameter trees from torch tensors by a conversion table, for parity tests."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
from flax import traverse_util

from blip3o_jax.convert.rules import TRANSFORMS, Rule


def tree_of(tensors: Mapping[str, np.ndarray], rules: Iterable[Rule]) -> dict:
    """The tree that `rules` make of `tensors`; exactly one rule must match each tensor."""
    leaves, stacks = {}, defaultdict(dict)
    for key, value in tensors.items():
        (rule, found), *others = [(rule, found) for rule in rules if (found := rule.match(key)) is not None]
        assert not others, key
        path = rule.target.format(**found)
        leaf = np.ascontiguousarray(TRANSFORMS[rule.transform].forward(np.asarray(value)))
        group, index = (stacks[path], found[rule.stack_names[0]]) if rule.stack_names else (leaves, path)
        assert index not in group, key
        group[index] = leaf
    leaves |= {path: np.stack([layers[i] for i in range(len(layers))]) for path, layers in stacks.items()}
    return traverse_util.unflatten_dict(leaves, sep="/")
