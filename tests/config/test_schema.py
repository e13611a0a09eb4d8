"""The schema: keys, types and ranges of nested configurations."""

import dataclasses
from typing import Annotated

import pytest

from blip3o_jax.config import schema
from blip3o_jax.config.presets import PRESETS, preset
from blip3o_jax.config.schema import Count, Named, OneOf, Range, Share, Variant, checked, from_dict, to_dict
from blip3o_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    size: Count
    share: Share = 0.5


@dataclasses.dataclass(frozen=True)
class Other(Inner):
    name: str = "other"
    depth: int = 1


class Row:
    Config = Other


class NoRow:
    Config = int


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    items: tuple[Inner, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    kind: Annotated[str, OneOf("a", "b")] = "a"
    reward: Annotated[str, Named({"ocr": None})] = "ocr"
    maybe: Annotated[int, Range(-1, 1)] | None = None
    flag: bool = False
    chosen: Annotated[Inner, Variant({"other": Row, "none": NoRow}, "other")] | None = None
    variant: Annotated[Inner, Variant({"other": Row, "none": NoRow}, "other")] = Other(1)


GOOD = {"inner": {"size": 3}}


def test_nested_values_become_dataclasses_and_come_back():
    values = {
        "inner": {"size": 3, "share": 1},
        "items": [{"size": 1}, {"size": 2}],
        "pair": [4, 5],
        "reward": "mine.module:Reward",
        "maybe": None,
        "variant": {"size": 2, "depth": 7},
    }
    built = from_dict(Outer, values)
    assert built.inner == Inner(3, 1.0) and isinstance(built.inner.share, float)
    assert built.items == (Inner(1), Inner(2)) and built.pair == (4, 5.0)
    assert built.variant == Other(2, depth=7)
    named = {"b": {"size": 2}, "a": {"size": 1}}  # sections are read in the order of their names
    assert from_dict(Outer, {**GOOD, "items": named}).items == (Inner(1), Inner(2))
    assert checked(built) == built == from_dict(Outer, to_dict(built))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iner": {}}, "iner: unknown key - expected a known one - did you mean inner"),
        *((root, "configuration: got .* - expected a mapping for Outer") for root in (3, None, [1], "inner")),
        ({"inner": {}}, "inner.size: missing - expected int"),
        ({"inner": 3}, "inner: got 3 - expected a mapping for Inner"),
        ({"inner": {"size": 0}}, "inner.size: got 0 - expected 1 to 2,147,483,647"),
        ({"inner": {"size": True}}, "inner.size: got True - expected int"),
        ({"inner": {"size": 1.0}}, "inner.size: got 1.0 - expected int"),
        ({"inner": {"size": None}}, "inner.size: not set - expected int"),
        ({"inner": {"size": 1, "share": 1.01}}, "inner.share: got 1.01 - expected 0 to 1"),
        ({"inner": {"size": 1, "share": float("nan")}}, "inner.share: got nan - expected a number that is finite"),
        ({"inner": {"size": 1, "share": 1e39}}, "inner.share: got 1e.39 - expected a number that is finite"),
        ({"inner": {"size": 1, "share": "1"}}, "inner.share: got '1' - expected float"),
        ({"items": [{"size": 1}, {"size": -1}]}, r"items\[1\].size: got -1"),
        ({"items": {"a": {"size": -1}}}, "items.a.size: got -1"),
        ({"items": "ab"}, "items: got 'ab'"),
        ({"pair": [1]}, "pair: got 1 values - expected 2"),
        ({"kind": "c"}, "kind: got 'c' - expected a | b"),
        ({"reward": "ocrr"}, "reward: got 'ocrr' .* did you mean ocr"),
        ({"reward": "os.system"}, "reward: got 'os.system'"),
        ({"maybe": 2}, "maybe: got 2 - expected -1 to 1"),
        ({"flag": 1}, "flag: got 1 - expected bool"),
        ({"variant": {"name": "othr", "size": 1}}, "variant.name: got 'othr' .* did you mean other"),
        ({"variant": {"name": 3, "size": 1}}, "variant.name: got 3 - expected str"),
        ({"variant": {"name": "none", "size": 1}}, "variant.name none: got Config .*int.* - expected a class whose"),
        ({"variant": {"size": 1, "dpth": 1}}, "variant.dpth: unknown key - expected a known one"),
        ({"variant": 3}, "variant: got 3 - expected a mapping for Other"),
    ],
)
def test_what_does_not_fit_is_named_by_its_path(change, message):
    with pytest.raises(UserError, match=message):
        from_dict(Outer, {**GOOD, **change} if isinstance(change, dict) else change)


def test_a_range_says_its_bounds():
    for allowed, value, words in (
        (Range(0), -1, "0 or more - "),
        (Range(0, 1 - 1e-7), 1.0, "0 or more, and below 1 - "),
    ):
        with pytest.raises(UserError, match=f"x: got {value} - expected {words}"):
            allowed.check(value, "x")
    Range(0).check(1e30, "x")


def test_sections_of_different_classes_differ_as_a_whole():
    one = Outer(Inner(1), variant=Other(1))
    other = dataclasses.replace(one, variant=Inner(1))
    assert schema.differences(one, one) == {}
    assert schema.differences(other, one) == {"variant": (Inner(1), Other(1))}
    assert schema.differences(dataclasses.replace(one, variant=Other(1, depth=2)), one) == {"variant.depth": (2, 1)}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_passes_its_own_checks(name):
    assert checked(preset(name)) == preset(name)


def test_a_checkpoint_from_before_backbones_had_names_keeps_its_meaning():
    values = to_dict(preset("tiny"))
    assert values["dit"].pop("name") == "sana"
    assert from_dict(type(preset("tiny")), values) == preset("tiny")


def test_numerics_reach_every_part_that_has_them():
    model = schema.with_dtype(preset("tiny"), dtype="bfloat16", remat="full", unroll=True)
    assert model.dit.remat == model.decoder.remat == model.image_tokenizer.encoder.remat == "full"
    assert model.connector.dtype == model.dit.dtype == "bfloat16" and model.dit.param_dtype == "float32"
    assert model.decoder.unroll and schema.with_dtype(model) == model
