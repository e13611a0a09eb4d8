"""Where a run starts: what a stage may change of the model it takes over, and what it may not."""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("grain")

from blip3o_jax import experiment, treepath
from blip3o_jax.config import MeanFlowConfig
from blip3o_jax.convert import checkpoint, native
from blip3o_jax.convert.checkpoint import open_checkpoint
from blip3o_jax.errors import UserError
from blip3o_jax.experiment.composition import load_parts
from blip3o_jax.experiment.start import open_named
from blip3o_jax.objectives import Objective, joint
from configs import tiny
from support.settings import changed


def settings_from(base, stage):
    config = tiny.get_config(stage)
    config.init_from = str(base)
    config.model.update({"schedule": {"shift": 1.0}, "token_guidance_scale": 2.0})
    return config.to_dict()


def test_an_editing_stage_starts_from_a_model_without_its_connector(golden_root, tmp_path):
    base = golden_root / "t2i" / "checkpoint"
    settings = settings_from(base, "edit")
    run = experiment.build(experiment.from_settings(settings), settings, str(tmp_path))
    params = jax.device_get(run.init_params())
    run.source.close()
    start = experiment.open_start(experiment.from_settings(settings))
    assert start.model.token_guidance_scale == 2 and str(start.tokenizer_dir) == settings["tokenizer"]
    start = experiment.open_start(experiment.from_settings(settings | {"tokenizer": None}))
    assert start.tokenizer_dir == base
    stored = open_checkpoint(base).load_params(param_dtype="float32", parts=["decoder"])
    np.testing.assert_array_equal(params["decoder"]["embed"]["table"], stored["decoder"]["embed"]["table"])
    assert np.std(params["vae_connector"]["hidden"]["kernel"]) > 0
    started_from = dict(run.settings["started_from"])
    assert started_from.pop("tokenizer") and started_from == {
        "init_from": open_checkpoint(base).identity,
        "reference_from": None,
    }


@pytest.mark.parametrize(
    ("part", "field", "value", "expected"),
    [("image_tokenizer", "temperature", 0.5, 0.03), ("dit", "mlp_ratio", 3.0, 2.5)],
)
def test_another_geometry_is_told_by_its_first_difference(golden_root, part, field, value, expected):
    settings = settings_from(golden_root / "t2i" / "checkpoint", "pretrain")
    settings["model"][part][field] = value
    config = experiment.from_settings(settings)
    with pytest.raises(UserError, match=f"model.{part}.{field}: got {value} - expected {expected}, as in .*checkpoint"):
        experiment.open_start(config)


def test_a_distilled_transformer_trains_by_the_objective_that_distils_alone(golden_root, tmp_path):
    opened = open_checkpoint(golden_root / "t2i" / "checkpoint")
    dit = dataclasses.replace(opened.config.dit, mean_flow=MeanFlowConfig(2, 3.0))
    model = dataclasses.replace(opened.config, dit=dit)
    native.save_native(tmp_path / "distilled", model, opened.load_params(parts=["connector"]))
    settings = tiny.get_config("pretrain").to_dict() | {"init_from": str(tmp_path / "distilled"), "model": None}
    frozen = ((r"^dit/", False), *settings["trainable"])
    for trainable, words in (
        (settings["trainable"], "joint: init_from is distilled"),
        (frozen, "parameters do not fit"),
    ):
        with pytest.raises(UserError, match=words):
            load_parts(experiment.from_settings(settings | {"trainable": trainable}), jax.devices()[:1])


def test_a_checkpoint_is_opened_with_the_backbone_that_the_experiment_names(golden_root, monkeypatch):
    monkeypatch.setattr(checkpoint, "open_checkpoint", lambda path, backbone: backbone)
    settings = settings_from(golden_root / "t2i" / "checkpoint", "pretrain")
    changes = ({}, {"model": None}, {"model": None, "backbone": "mine:Own"})
    named = [open_named(experiment.from_settings(settings | change), "path") for change in changes]
    assert named == ["sana", None, "mine:Own"]


def test_a_part_to_which_a_stage_adds_parameters_keeps_the_others(golden_root):
    base = golden_root / "t2i" / "checkpoint"
    settings = tiny.get_config("steps").to_dict() | {"init_from": str(base), "model": None}
    parts = load_parts(experiment.from_settings(settings), jax.devices()[:1])
    got = treepath.flatten(parts.loaded.select({"dit": parts.start.shapes["dit"]}, "float32"))
    stored = treepath.flatten(open_checkpoint(base).load_params(param_dtype="float32", parts=["dit"]))
    assert got.keys() - stored.keys() and not stored.keys() - got.keys()
    for path, leaf in stored.items():
        np.testing.assert_array_equal(got[path], leaf, err_msg=path)


@pytest.mark.parametrize(
    ("change", "leaf"),
    [
        ({}, "decoder/layers/attention/query/kernel"),
        ({"adapter": {"rank": 2}}, "decoder/layers/attention/query/lora_a"),
    ],
)
def test_first_values_are_drawn_by_the_seed(tmp_path, change, leaf):
    drawn = []
    for seed in (0, 0, 1):
        settings = changed(tiny.get_config("sft").to_dict(), validation=None, loop__seed=seed, **change)
        run = experiment.build(experiment.from_settings(settings), settings, str(tmp_path), jax.devices()[:1])
        drawn.append(np.asarray(treepath.flatten(run.init_params())[leaf]))
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 0


def test_a_setting_without_a_value_and_a_section_by_name_are_read(golden_root):
    settings = settings_from(golden_root / "t2i" / "checkpoint", "pretrain")
    world = settings["data"]["sources"][0]
    settings["data"]["sources"] = {"second": world, "first": {**world, "weight": 2}}
    assert [source.weight for source in experiment.from_settings(settings).data.sources] == [2.0, 1.0]
    settings["data"]["sources"]["second"]["path"] = None
    with pytest.raises(UserError, match="data.sources.second.path: not set"):
        experiment.from_settings(settings)


HEAD = {"head": lambda key: {"w": jax.random.normal(key, (3,))}}


def lost(key):
    raise KeyError("own")


@pytest.mark.parametrize(
    ("modules", "copied", "message"),
    [
        ({"dit": HEAD["head"]}, {}, "extra_modules: dit: got a part of the model"),
        ({"head": None}, {}, "extra_modules: head: got None - expected a function of a key"),
        ({"head": lost}, {}, r"extra_modules: head: got KeyError: 'own' \(test_starting_points.py:\d+\)"),
        ({"head": jax.random.normal}, {}, r"extra_modules: head: got an array float32\[\] - expected a dictionary"),
        (HEAD, {"head": "decodr"}, "copied: head: got decodr - expected a path of the model that has its parameters"),
        (HEAD, {"head": "connector"}, "copied: head: got connector - expected a path of the model that has its"),
    ],
)
def test_extra_modules_that_do_not_fit_are_refused_by_name(monkeypatch, modules, copied, message):
    own = Objective(joint.Settings, joint.make, extra_modules=lambda *inputs: modules, copied=copied)
    monkeypatch.setattr(f"{__name__}.mine", own, raising=False)
    values = tiny.get_config("pretrain").to_dict() | {"objective": f"{__name__}:mine", "settings": {}}
    start = experiment.open_start(experiment.from_settings(values))
    with pytest.raises(UserError, match=f"objective: {message}"):
        _ = start.shapes
