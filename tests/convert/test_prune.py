"""Checkpoints with fewer blocks in the diffusion transformer."""

import types

import numpy as np
import pytest

from blip3o_jax.cli import convert as command
from blip3o_jax.config import schema
from blip3o_jax.config.model import BackboneConfig
from blip3o_jax.config.presets import preset
from blip3o_jax.convert import checkpoint
from blip3o_jax.convert.checkpoint import open_checkpoint
from blip3o_jax.convert.prune import prune
from blip3o_jax.convert.random_weights import random_checkpoint
from blip3o_jax.errors import UserError
from blip3o_jax.treepath import flatten


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "whole"
    random_checkpoint(preset("tiny"), folder, seed=2)
    return folder


def test_the_blocks_that_are_kept_are_unchanged_in_both_layouts(source, tmp_path):
    command.main(["prune", str(source), str(tmp_path / "pruned"), "--blocks", "1"])
    command.main(["export", str(tmp_path / "pruned"), str(tmp_path / "released")])
    whole = flatten(open_checkpoint(source).load_params())
    for path in (tmp_path / "pruned", tmp_path / "released"):
        opened = open_checkpoint(path)
        assert schema.differences(opened.config, open_checkpoint(source).config) == {"dit.depth": (1, 2)}
        for name, leaf in flatten(opened.load_params()).items():
            expected = whole[name][1:2] if name.startswith("dit/blocks/") else whole[name]
            np.testing.assert_array_equal(leaf, expected, err_msg=name)


@pytest.mark.parametrize("blocks", [[1, 0], [0, 0], [2], [0, 2]])
def test_blocks_that_the_transformer_lacks_or_in_another_order_are_refused(source, tmp_path, refusal, blocks):
    words = refusal(command.main, ["prune", source, tmp_path / "pruned", "--blocks", *blocks])
    assert f"--blocks: got {' '.join(map(str, blocks))} - expected increasing numbers from 0 to 1" in words
    assert not (tmp_path / "pruned").exists()


def test_only_blocks_of_sana_are_dropped(tmp_path, monkeypatch):
    own = BackboneConfig(name="mine:Own", in_channels=4, caption_channels=8)
    opened = types.SimpleNamespace(config=types.SimpleNamespace(dit=own))
    monkeypatch.setattr(checkpoint, "open_checkpoint", lambda source: opened)
    with pytest.raises(UserError, match="source: the backbone is mine:Own - expected sana"):
        prune("source", tmp_path / "pruned", [0])
