"""Connectors: `Sequential(Linear, GELU, Linear, RMSNorm)` of the reference to `models/connector.py`."""

from blip3o_jax.convert.rules import Rule, layer

RULES: tuple[Rule, ...] = (*layer("0", "hidden"), *layer("2", "out"), *layer("3", "norm", "identity", bias=False))
