"""Connectors: `Sequential(Linear, GELU, Linear, RMSNorm)` of the reference to `models/connector.py`."""

from blip3o_jax.convert.rules import Rule, Unused

RULES: tuple[Rule, ...] = (
    Rule("0.weight", "hidden/kernel", "linear"),
    Rule("0.bias", "hidden/bias", "identity"),
    Rule("2.weight", "out/kernel", "linear"),
    Rule("2.bias", "out/bias", "identity"),
    Rule("3.weight", "norm/scale", "identity"),
)

UNUSED: tuple[Unused, ...] = ()
