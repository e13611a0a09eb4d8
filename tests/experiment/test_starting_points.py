"""Where a run starts: what a stage may change of the model it takes over, and what it may not."""

import jax
import numpy as np
import pytest

pytest.importorskip("grain")

from blip3o_jax import experiment
from blip3o_jax.convert.checkpoint import open_checkpoint
from blip3o_jax.errors import UserError
from configs import tiny


def settings_from(checkpoint, stage):
    config = tiny.get_config(stage)
    config.init_from = str(checkpoint)
    config.model.update({"schedule": {"shift": 1.0}, "token_guidance_scale": 2.0})
    return config.to_dict()


def test_an_editing_stage_starts_from_a_model_without_its_connector(golden_root, tmp_path):
    checkpoint = golden_root / "t2i" / "checkpoint"
    settings = settings_from(checkpoint, "edit")
    run = experiment.build(experiment.from_settings(settings), settings, str(tmp_path))
    params = jax.device_get(run.init_params())
    run.source.close()
    assert experiment.open_start(experiment.from_settings(settings)).model.token_guidance_scale == 2
    stored = open_checkpoint(checkpoint).load_params(param_dtype="float32", parts=["decoder"])
    np.testing.assert_array_equal(params["decoder"]["embed"]["table"], stored["decoder"]["embed"]["table"])
    assert np.std(params["vae_connector"]["hidden"]["kernel"]) > 0
    started_from = dict(run.settings["started_from"])
    assert started_from.pop("tokenizer") and started_from == {
        "init_from": open_checkpoint(checkpoint).identity,
        "reference_from": None,
    }


def test_another_geometry_is_told_by_its_first_difference(golden_root):
    settings = settings_from(golden_root / "t2i" / "checkpoint", "pretrain")
    settings["model"]["image_tokenizer"]["temperature"] = 0.5
    config = experiment.from_settings(settings)
    with pytest.raises(
        UserError, match=r"model.image_tokenizer.temperature: got 0.5 - expected 0.03, as in .*checkpoint"
    ):
        experiment.open_start(config)


def test_a_setting_without_a_value_and_a_section_by_name_are_read(golden_root):
    settings = settings_from(golden_root / "t2i" / "checkpoint", "pretrain")
    world = settings["data"]["sources"][0]
    settings["data"]["sources"] = {"second": world, "first": {**world, "weight": 2}}
    assert [source.weight for source in experiment.from_settings(settings).data.sources] == [2.0, 1.0]
    settings["data"]["sources"]["second"]["path"] = None
    with pytest.raises(UserError, match="data.sources.second.path: not set"):
        experiment.from_settings(settings)
