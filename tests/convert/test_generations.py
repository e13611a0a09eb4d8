"""Configurations of transformers 4 and 5: one meaning, refusals by name, and the form that both read."""

import pathlib

import pytest

from blip3o_jax.convert.fields import Fields
from blip3o_jax.convert.generations import check_generations, config_for_both, rope_theta, tokenizer_for_both
from blip3o_jax.errors import UserError

V5 = {"rope_theta": 5e5, "rope_type": "default"}


def fields(values):
    return Fields(pathlib.Path("config.json"), values)


@pytest.mark.parametrize(
    "values",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 500000, "rope_scaling": None, "partial_rotary_factor": 1.0},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": V5},
        {"rope_theta": 5e5, "rope_parameters": V5},
        {"rope_parameters": {"full_attention": V5, "sliding_attention": V5}},
        {"rope_parameters": {**V5, "factor": 1.0, "attention_factor": None, "partial_rotary_factor": 1}},
    ],
)
def test_theta_is_read_from_both_generations(values):
    assert rope_theta(fields(values)) == 5e5
    again = config_for_both(fields(values))
    assert again["rope_theta"] == 5e5 and "rope_parameters" not in again


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "rope_theta: got none"),
        ({"rope_theta": 1e6, "rope_parameters": V5}, "rope_parameters.rope_theta: got 500000.0"),
        ({"rope_parameters": {"full_attention": V5, "sliding_attention": {"rope_theta": 1e4}}}, "attention.rope_theta"),
        *[
            ({"rope_theta": 5e5, key: {"rope_type": kind, "factor": 4.0}}, f"{key}.rope_type: got '{kind}'")
            for key in ("rope_scaling", "rope_parameters")
            for kind in ("yarn", "linear", "dynamic", "llama3", "longrope", "su")
        ],
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear"}}, "rope_scaling.type: got 'linear'"),
        ({"rope_theta": 5e5, "rope_scaling": {"factor": 4.0}}, "rope_scaling.factor: got 4.0"),
        ({"rope_parameters": {**V5, "full_attention": {"rope_type": "yarn"}}}, "full_attention.rope_type: got 'yarn'"),
        ({"rope_parameters": {**V5, "partial_rotary_factor": 0.5}}, "partial_rotary_factor: got 0.5"),
        ({"rope_parameters": {**V5, "attention_factor": 1.3}}, "attention_factor: got 1.3"),
        ({"rope_parameters": {**V5, "mrope_section": [8, 8]}}, "mrope_section"),
        ({"rope_theta": 5e5, "partial_rotary_factor": 0.25}, "partial_rotary_factor: got 0.25"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "dtype: got float16"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_theta": "5e5"}, "rope_theta: got '5e5'"),
        ({"rope_theta": True}, "rope_theta: got True"),
        ({"rope_parameters": [V5]}, "rope_parameters: got"),
    ],
)
def test_scaled_partial_and_contradicting_positions_are_refused_by_name(values, words):
    with pytest.raises(UserError, match=words):
        check_generations(fields(values))
        rope_theta(fields(values))


def test_a_configuration_of_version_4_stays_as_it_is_and_version_5_becomes_what_both_read():
    values = {"rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "bfloat16"}
    assert config_for_both(fields(values)) == values
    got = config_for_both(fields({"rope_parameters": V5, "dtype": "bfloat16"}))
    assert got == {"rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "bfloat16"}
    values = {"extra_special_tokens": ["<a>", "<b>"], "tokenizer_class": "TokenizersBackend"}
    expected = {"additional_special_tokens": ["<a>", "<b>"], "tokenizer_class": "PreTrainedTokenizerFast"}
    assert tokenizer_for_both(values) == expected
    assert tokenizer_for_both({"extra_special_tokens": {}}) == {"extra_special_tokens": {}}
