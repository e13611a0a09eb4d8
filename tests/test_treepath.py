"""Rules over parameter paths."""

import flax.linen as nn
import numpy as np
import pytest

from blip3o_jax import treepath
from blip3o_jax.errors import UserError

TREE = {"decoder": {"layers": {"kernel": 1, "bias": 2}}, "dit": {"caption_norm": {"scale": 3}, "out": {"kernel": 4}}}


def test_the_first_rule_that_matches_decides():
    values = treepath.match(TREE, (("caption", "c"), ("^dit/", "d"), ("kernel$", "k"), ("", "rest")), "rules")
    assert treepath.flatten(values) == {
        "decoder/layers/kernel": "k",
        "decoder/layers/bias": "rest",
        "dit/caption_norm/scale": "c",
        "dit/out/kernel": "d",
    }


def test_partition_and_merge_are_inverse():
    trainable, frozen = treepath.partition(TREE, (("caption", True), ("^dit/", False), ("", True)))
    assert treepath.flatten(frozen) == {"dit/out/kernel": 4}
    assert treepath.merge(trainable, frozen) == TREE
    box = nn.LogicallyPartitioned(np.zeros(2), ("embed",))
    trainable, frozen = treepath.partition({"a": {"kernel": box}}, (("", True),))
    assert trainable["a"]["kernel"] is box
    assert frozen == {}


def test_a_leaf_without_a_rule_and_an_invalid_expression_are_named():
    with pytest.raises(UserError, match="trainable: parameter dit/caption_norm/scale"):
        treepath.partition(TREE, (("decoder", True), ("out", False)))
    for pattern in ("(", 10_000 * "(" + 10_000 * ")", "a{99999999999}"):
        with pytest.raises(UserError, match=r"rules: got '.*' - expected a regular expression"):
            treepath.match(TREE, ((pattern, 1),), "rules")


def test_a_leaf_in_two_trees_cannot_be_merged():
    with pytest.raises(AssertionError, match="decoder/layers/kernel"):
        treepath.merge(TREE, {"decoder": {"layers": {"kernel": 5}}})
