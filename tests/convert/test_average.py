"""The mean of checkpoints."""

import dataclasses

import numpy as np
import pytest

from blip3o_jax.cli import convert as command
from blip3o_jax.config.presets import preset
from blip3o_jax.convert import native
from blip3o_jax.convert.checkpoint import ReleasedCheckpoint, open_checkpoint
from blip3o_jax.convert.random_weights import random_checkpoint
from blip3o_jax.treepath import flatten, unflatten


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A checkpoint in the released layout, and in ours one with the same weights but for the decoder's."""
    folder = tmp_path_factory.mktemp("sources")
    random_checkpoint(preset("tiny"), folder / "first", seed=2)
    first = open_checkpoint(folder / "first")
    params = flatten(first.load_params(param_dtype="float32"))
    moved = {path: leaf + 0.5 * path.startswith("decoder/") for path, leaf in params.items()}
    native.save_native(folder / "second", first.config, unflatten(moved), first.origin())
    return folder / "first", folder / "second"


def test_the_mean_of_models_has_the_mean_of_their_weights_and_what_they_have_in_common_unchanged(sources, tmp_path):
    command.main(["average", *map(str, sources), str(tmp_path / "mean")])
    mean, first = open_checkpoint(tmp_path / "mean"), open_checkpoint(sources[0])
    assert mean.config == first.config
    assert (mean.tokenizer_dir / "tokenizer.json").read_bytes() == (first.tokenizer_dir / "tokenizer.json").read_bytes()
    before, second = (flatten(open_checkpoint(path).load_params(param_dtype="float32")) for path in sources)
    for path, leaf in flatten(mean.load_params()).items():
        assert leaf.dtype == np.float32
        if path.startswith("decoder/"):
            np.testing.assert_allclose(leaf, (before[path] + second[path]) / 2, rtol=1e-6, err_msg=path)
            assert np.abs(leaf - before[path]).max() > 0.2
        else:
            np.testing.assert_array_equal(leaf, before[path], err_msg=path)


def test_models_that_cannot_be_averaged_are_refused(sources, tmp_path, refusal):
    config = dataclasses.replace(preset("tiny"), token_guidance_scale=2.0)
    random_checkpoint(config, tmp_path / "other", seed=0)
    for others, words in (
        ([tmp_path / "other"], "token_guidance_scale is 2.0 - expected 1.0"),
        ([], "got 1 checkpoint"),
    ):
        assert words in refusal(command.main, ["average", sources[0], *others, tmp_path / "mean"])
    assert not (tmp_path / "mean").exists()


def test_a_directory_that_exists_is_refused_before_weights_are_read(sources, monkeypatch, refusal):
    monkeypatch.delattr(ReleasedCheckpoint, "load_params")
    assert "exists already" in refusal(command.main, ["average", *sources, sources[0]])
