"""Reads config.json and tokenizer_config.json of transformers 4 and 5, and converts them to a form that both read.

transformers 4: `rope_theta`, `rope_scaling`, `torch_dtype`, `additional_special_tokens`. transformers 5:
`rope_parameters` with `rope_theta` and `rope_type`, flat or by layer type, `dtype`, `extra_special_tokens` as a list.
Version 4 ignores `rope_parameters` and uses the default theta without a warning; version 5 reads both forms.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from blip3o_jax.config.schema import Positive, convert_value
from blip3o_jax.convert.fields import Fields
from blip3o_jax.errors import require

ROPE_KEYS = ("rope_parameters", "rope_scaling")
# Values without effect on the rotary positions; all other settings must be null
NEUTRAL = {"rope_type": ("default",), "type": ("default",), "factor": (1,), "attention_factor": (1,),
           "partial_rotary_factor": (1,)}  # fmt: skip
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")


def rope_theta(values: Fields) -> float:
    """Returns the base of the rotary frequencies in config.json.

    Raises:
      UserError: no base, two different bases, or scaled or partial rotary positions.
    """
    found, path = {}, values.path
    for place, section in _sections(values):
        for name, value in section.items():
            if name == "rope_theta" and value is not None:
                found[f"{place}{name}"] = convert_value(Positive, value, f"{path}: {place}{name}")
            elif name not in LAYER_TYPES and name != "rope_theta" and value is not None:
                allowed = NEUTRAL.get(name, (None,))
                good = value in allowed and not isinstance(value, bool)
                expected = f"{allowed[0]!r}: positions are neither scaled nor rotated in part"
                require(good, f"{path}: {place}{name}", repr(value), expected, "pass a model without it")
    require(found, f"{path}: rope_theta", "none", "one here or in rope_parameters", "add it")
    (first, theta), *others = found.items()
    for name, value in others:
        require(value == theta, f"{path}: {name}", value, f"{theta}, the value of {first}", "correct one of them")
    return theta


def check_generations(values: Fields) -> None:
    """Raises UserError if fields of both versions contradict each other, or a layer does not use full attention."""
    path = values.path
    old, new = (str(values.get(name) or "").removeprefix("torch.") for name in ("torch_dtype", "dtype"))
    require(not old or not new or old == new, f"{path}: dtype", new, f"{old}, as torch_dtype says", "delete one")
    layers = values.get("layer_types")
    good = layers is None or isinstance(layers, list) and all(kind == "full_attention" for kind in layers)
    require(good, f"{path}: layer_types", layers, "full_attention in every layer", "this variant is not implemented")


def config_for_both(values: Fields) -> dict[str, Any]:
    """Returns config.json in the form that transformers 4 and 5 both read: without `rope_parameters` and `dtype`."""
    if "rope_parameters" not in values and "dtype" not in values and values.get("rope_theta") is not None:
        return dict(values)
    out = {**values, "rope_theta": rope_theta(values), "rope_scaling": None}
    dtype = out.pop("dtype", None)
    out.pop("rope_parameters", None)
    return out if dtype is None else {**out, "torch_dtype": dtype}


def tokenizer_for_both(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns tokenizer_config.json in the form that transformers 4 and 5 both read."""
    out = dict(values)
    if isinstance(out.get("extra_special_tokens"), list):
        tokens = [*(out.get("additional_special_tokens") or []), *out.pop("extra_special_tokens")]
        out["additional_special_tokens"] = [token for i, token in enumerate(tokens) if token not in tokens[:i]]
    if out.get("tokenizer_class") == "TokenizersBackend":
        out["tokenizer_class"] = "PreTrainedTokenizerFast"
    return out


def _sections(values: Fields) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the settings of rotary positions, section by section, with the prefix of their names."""
    yield "", {name: values.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    for name in ROPE_KEYS:
        section = values.get(name)
        if section is not None:
            section = convert_value(dict, section, f"{values.path}: {name}")
            yield f"{name}.", section
            for kind in LAYER_TYPES:
                if section.get(kind) is not None:
                    yield f"{name}.{kind}.", convert_value(dict, section[kind], f"{values.path}: {name}.{kind}")
