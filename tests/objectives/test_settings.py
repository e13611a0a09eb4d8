"""Ranges of the settings of all objectives."""

import dataclasses

import numpy as np
import pytest

from blip3o_jax import experiment
from blip3o_jax.config import schema
from blip3o_jax.errors import UserError
from blip3o_jax.objectives import (
    Objective,
    autoencoder,
    flow_grpo,
    grpo,
    grpo_nft,
    joint,
    matching,
    mean_flow,
    tokenizer,
)
from blip3o_jax.train.step import Scheduled
from blip3o_jax.types import Batch
from configs import tiny

NAN, INF = float("nan"), float("inf")
REFUSED = {
    autoencoder: [
        ("distance", "l3"), ("laplacian_weight", -1.0), ("unit_weight", INF), ("latent_noise", NAN),
        ("adversarial", {"weight": 0.0}), ("adversarial", {"start_step": -1}),
        ("adversarial", {"discriminator": {"width": 0}}), ("adversarial", {"discriminator": {"depth": 10**6}}),
    ],
    tokenizer: [
        ("features", {"distance": "l1"}), ("features", {"weight": -1.0}), ("pixels", {"distance": "cosine"}),
        ("pixels", {"hidden": 0}), ("codebook_weight", -1.0), ("commitment_weight", NAN), ("pool_scales", ()),
        ("pool_scales", (0,)), ("unquantized_share", 1.5),
    ],
    joint: [
        ("ce_weight", -1.0), ("flow_weight", INF), ("condition_dropout", 1.1), ("flow_draws", 0), ("flow_every", 0),
        ("window", "head"), ("ce_chunk", 0),
    ],
    mean_flow: [
        ("max_steps", 0), ("guidance_scale", INF), ("draws", 0), ("time_blur", -0.1), ("instant_share", 1.1),
        ("weight_power", -1.0), ("weight_floor", 0.0), ("window", "head"), ("encode_rows", -1),
    ],
    grpo: [
        ("clip_low", 0.0), ("clip_low", 1.5), ("clip_high", 0.0), ("beta", -0.1), ("reduction", "mean"), ("chunk", 0),
        ("token_guidance_scale", INF), ("sampling", {"temperature": 0.0}), ("sampling", {"top_k": -1}),
        ("sampling", {"top_p": 0.0}),
    ],
    flow_grpo: [
        ("num_inference_steps", 1), ("num_inference_steps", 10**6), ("train_steps", 0), ("train_steps", 11),
        ("noise_level", 0.0), ("guidance_scale", INF), ("clip", 0.0), ("beta", -1.0), ("token_guidance_scale", INF),
    ],
    grpo_nft: [("beta", -0.1), ("velocity_beta", -1.0), ("draws", 0), ("nft_beta", 0.0), ("advantage_range", INF)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "name", "value"),
    [(objective, name, value) for objective, values in REFUSED.items() for name, value in values],
)
def test_values_out_of_range_are_refused(objective, name, value):
    base = {"pixels": {}} if objective is tokenizer and name != "pixels" else {}
    with pytest.raises(UserError, match=f"^settings.{name}"):
        schema.from_dict(objective.Settings, {**base, name: value}, "settings")


def settings_from(objective, monkeypatch):
    """Resolves an objective of another package."""
    monkeypatch.setattr(f"{__name__}.mine", objective, raising=False)
    values = tiny.get_config("pretrain").to_dict() | {"objective": f"{__name__}:mine", "settings": {}}
    return experiment.from_settings(values).resolve_objective()[0]


def test_both_halves_have_settings_of_their_own():
    own = grpo_nft.Settings(beta=0.1, draws=2, velocity_beta=0.3, nft_beta=0.5, advantage_range=2.0)
    assert own.painting == matching.NftSettings(beta=0.3, draws=2, nft_beta=0.5, advantage_range=2.0)


@pytest.mark.parametrize(("settings", "got"), [(dict, "a type"), (joint.Settings(), "a Settings")])
def test_settings_of_an_objective_are_a_dataclass(monkeypatch, settings, got):
    with pytest.raises(UserError, match=f"objective .*:mine: Settings: got {got} - expected a frozen dataclass"):
        settings_from(Objective(settings, joint.make), monkeypatch)


@pytest.mark.parametrize(
    "name, returned, message",
    [
        ("make", None, "got None back - expected a loss function"),
        ("geometry", ("tiny",), "got a tuple of 1 back - expected a Blip3oConfig"),
        ("fields", "target_pixels", "got a str back - expected a tuple of fields of types.Batch"),
        ("extra_modules", [], "got a list back - expected a dictionary of functions"),
        ("first_parameters", None, "got None back - expected the parameters it was given"),
        ("first_parameters", {"a": np.ones(3)}, "got a dict back - expected the parameters it was given"),
        ("flops_per_step", "many", "got a str back - expected a number or None"),
    ],
)
def test_what_an_objective_of_ones_own_returns_is_checked(monkeypatch, name, returned, message):
    own = Objective(**{"Settings": joint.Settings, "make": joint.make} | {name: lambda *inputs: returned})
    resolved = settings_from(own, monkeypatch)
    with pytest.raises(UserError, match=f"objective .*:mine: {name}: {message}"):
        getattr(resolved, name)(None, None, {"a": np.ones(2)})
    assert resolved.copied is own.copied
    plain = settings_from(Objective(joint.Settings, joint.make), monkeypatch)
    assert plain.geometry is Objective.geometry  # told from geometries of one's own by `experiment`


def fails(*inputs):
    """What any function of an objective may do."""
    raise KeyError("own")


@pytest.mark.parametrize("name", ["make", "geometry", "fields", "extra_modules", "first_parameters", "flops_per_step"])
def test_what_a_function_of_a_custom_objective_raises_names_it_and_its_line(monkeypatch, name):
    resolved = settings_from(Objective(**{"Settings": joint.Settings, "make": joint.make} | {name: fails}), monkeypatch)
    with pytest.raises(UserError, match=rf"objective .*:mine: {name}: got KeyError: 'own' \(test_settings.py:\d+\)"):
        getattr(resolved, name)(None, None, None)


@pytest.mark.parametrize("loss", [fails, Scheduled(lambda step, key: fails, fails)])
def test_what_a_custom_loss_raises_names_it_and_its_line(monkeypatch, loss):
    message = r"objective .*:mine: loss: got KeyError: 'own' \(test_settings.py:\d+\) - expected no exception"
    made = settings_from(Objective(joint.Settings, lambda *inputs: loss), monkeypatch).make(None, None)
    assert isinstance(made, Scheduled) is isinstance(loss, Scheduled)
    for one in (made, made.at(0, None)) if isinstance(made, Scheduled) else (made,):
        with pytest.raises(UserError, match=message):
            one(None, None, None)


@dataclasses.dataclass(frozen=True)
class Strict:
    power: float = 2.0

    def __post_init__(self):
        if self.power > 1:
            raise ValueError("too large")


def test_what_custom_settings_raise_names_the_objective(monkeypatch):
    with pytest.raises(UserError, match=r"objective .*:mine: settings: got ValueError: too large \(test_settings.py:"):
        settings_from(Objective(Strict, joint.make), monkeypatch)


@pytest.mark.parametrize(
    ("encode", "field"), [(joint.encode_codes, "target_tokenizer_pixels"), (joint.encode_latents, "target_pixels")]
)
def test_images_that_an_objective_does_not_ask_for_are_missed_by_name(encode, field):
    batch = Batch(**dict.fromkeys(["tokens", "length", "loss_mask", "image_slot", "window_start", "ref_mask"]))
    with pytest.raises(UserError, match=f"batch: got no {field} - expected images .* in the objective's `fields`"):
        encode(tiny.TINY, {}, batch)
