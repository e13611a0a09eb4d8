"""A backbone and an objective from outside the package: named in a configuration, trained, sampled from."""

import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest

pytest.importorskip("grain")

from blip3o_jax import experiment, flops
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.schema import from_dict
from blip3o_jax.convert import checkpoint, export, native
from blip3o_jax.errors import UserError
from blip3o_jax.models import blip3o
from blip3o_jax.pipeline import Pipeline
from blip3o_jax.train import loop
from configs import common, tiny

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
DIT = {"name": "backbone:Transformer", "in_channels": 32, "caption_channels": 96, "width": 32, "num_heads": 2}


@pytest.fixture(scope="module", autouse=True)
def outside(tmp_path_factory):
    """A working directory with the examples, as modules of a user's own; the package is elsewhere."""
    directory = tmp_path_factory.mktemp("outside")
    for name in ("backbone", "objective"):
        shutil.copy(EXAMPLES / f"{name}.py", directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        patch.setattr(sys, "path", list(sys.path))
        yield directory
    for name in ("backbone", "objective"):
        sys.modules.pop(name, None)


def settings_of(steps: int, **changes) -> dict:
    settings = {**tiny.get_config("pretrain").to_dict(), **changes}
    settings["validation"] = None
    settings["loop"] |= {"num_steps": steps, "log_every": 1, "save_every": steps}
    return settings


def train(settings: dict, workdir: pathlib.Path) -> list[dict]:
    """Records of a run."""
    config = experiment.from_settings(settings)
    loop.train(experiment.build(config, settings, str(workdir), jax.devices()[:1]), config.loop, str(workdir))
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(outside):
    """The model of a short run with the backbone of the example, and its records."""
    settings = settings_of(6)
    settings["model"]["dit"] = dict(DIT)
    return outside / "run" / "model", train(settings, outside / "run")


def test_a_backbone_from_outside_trains_and_samples(trained):
    model, records = trained
    losses = [record["loss_flow"] for record in records if "loss_flow" in record]
    assert losses[-1] < losses[0]
    assert json.loads((model / native.META).read_text())["config"]["dit"]["name"] == DIT["name"]
    named = Pipeline.from_pretrained(model, "float32", backbone=DIT["name"])
    pictures = [
        named("a red circle", seed=seed, num_inference_steps=2, guidance_scale=scale).images[0]
        for seed, scale in ((0, 1.0), (0, 3.0), (1, 3.0))
    ]
    assert all(picture.size == (32, 32) for picture in pictures)
    assert len({np.asarray(picture).tobytes() for picture in pictures}) == 3
    with pytest.raises(UserError, match="the only one that the released layout has a place for"):
        export.export_checkpoint(checkpoint.open_checkpoint(model, backbone=DIT["name"]), model.parent / "released")


def test_a_run_may_start_from_a_checkpoint_of_another_backbone(trained):
    model, _ = trained
    start = experiment.open_start(experiment.from_settings({**settings_of(1, init_from=str(model)), "model": None,
                                                            "backbone": DIT["name"]}))  # fmt: skip
    assert start.model.dit.name == DIT["name"] and start.loads("dit") and start.loads("decoder")
    sana = experiment.from_settings(settings_of(1, init_from=str(model), backbone=DIT["name"]))
    start = experiment.open_start(sana)
    assert start.model.dit.name == "sana" and not start.loads("dit") and start.loads("decoder")
    with pytest.raises(UserError, match="is code outside this package"):
        experiment.open_start(experiment.from_settings(settings_of(1, init_from=str(model))))


def test_an_objective_from_outside_trains(outside):
    settings = settings_of(
        6, objective="objective:OBJECTIVE", settings={"huber_delta": 0.2}, trainable=common.CONNECTORS_AND_DIT
    )
    records = train(settings, outside / "run_objective")
    losses = [record["loss_robust_flow"] for record in records if "loss_robust_flow" in record]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("dit", "message"),
    [
        ({"name": "sanna"}, "dit.name: got 'sanna' - expected one of sana - did you mean sana"),
        ({"name": "nowhere:Backbone"}, "dit.name nowhere:Backbone: got ModuleNotFoundError"),
        ({"name": "json:loads"}, "dit.name json:loads: got Config None - expected a class whose attribute Config"),
        ({"name": ["sana"]}, r"dit.name: got \['sana'\] - expected str"),
        ({**DIT, "width": 0}, "dit.width: got 0"),
        ({**DIT, "in_channels": 8}, "dit.in_channels: got 8 - expected 32"),
        ({**DIT, "heads": 2}, "dit.heads: unknown key .* did you mean num_heads"),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused_in_one_line(outside, dit, message):
    model = {**tiny.get_config("pretrain").model.to_dict(), "dit": dit}
    with pytest.raises(UserError, match=message):
        from_dict(Blip3oConfig, model)


WRONG = """
import flax.linen as nn
from backbone import Config

class Wrong(nn.Module):
    config: Config
    Config = Config

    def __call__(self, x, t, conditions):
        return {"tuple": (x, t), "flat": x.reshape(len(x), -1), "codes": x.astype("int32")}.get(self.config.name[6:])

    denoise = __call__

    @staticmethod
    def flops(config, cells, condition):
        return {"tuple": (1.0, "2"), "flat": 3.0}.get(config.name[6:])

tuple = flat = codes = none = Wrong
"""


@pytest.mark.parametrize(
    ("name", "got"),
    [("none", "None"), ("tuple", "a tuple of 2"), ("flat", r"an array float32\[2, 512\]"), ("codes", "an array int32")],
)
@pytest.mark.parametrize(("method", "conditions"), [("__call__", ()), ("denoise", np.zeros((2, 3, 96)))])
def test_what_a_backbone_returns_is_checked(outside, name, got, method, conditions):
    (outside / "wrong.py").write_text(WRONG)
    model = {**tiny.get_config("pretrain").model.to_dict(), "dit": {**DIT, "name": f"wrong:{name}"}}
    config = from_dict(Blip3oConfig, model)
    with pytest.raises(UserError, match=rf"backbone wrong:{name}: {method}: got {got}.* - expected an array float32"):
        blip3o.velocity(config, {"dit": {}}, jax.numpy.zeros((2, 4, 4, 32)), np.float32(1), conditions)


@pytest.mark.parametrize(("name", "got"), [("none", "None"), ("tuple", "a tuple of 2"), ("flat", "a float")])
def test_what_a_backbone_counts_is_checked(outside, name, got):
    (outside / "wrong.py").write_text(WRONG)
    model = {**tiny.get_config("pretrain").model.to_dict(), "dit": {**DIT, "name": f"wrong:{name}"}}
    with pytest.raises(UserError, match=f"backbone wrong:{name}: flops: got {got} - expected a tuple of 2 numbers"):
        flops.dit(from_dict(Blip3oConfig, model), 16, 20)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("joind", "objective: got 'joind' .* did you mean joint"),
        ("objective:make", "objective objective:make: got a function - expected an instance of Objective"),
        ("nowhere:OBJECTIVE", "objective nowhere:OBJECTIVE: got ModuleNotFoundError"),
    ],
)
def test_an_objective_that_is_none_is_refused_in_one_line(outside, name, message):
    with pytest.raises(UserError, match=message):
        experiment.from_settings(settings_of(1, objective=name)).resolve_objective()


def test_a_checkpoint_alone_never_imports_its_backbone(trained, outside, monkeypatch):
    model, _ = trained
    monkeypatch.delitem(sys.modules, "backbone")
    source = (outside / "backbone.py").read_text()
    (outside / "backbone.py").write_text("raise SystemExit('imported')")
    try:
        for given in (None, "other:Transformer"):
            with pytest.raises(UserError, match="'backbone:Transformer' is code outside this package: .* if you trust"):
                Pipeline.from_pretrained(model, backbone=given)
        assert "backbone" not in sys.modules
    finally:
        (outside / "backbone.py").write_text(source)
