"""Identity of a model's weights, which neither layout, files, sharding, machine nor rounding to bfloat16 change.

It is a hash of a sample of every tensor: the last values along every axis.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.models.blip3o import abstract_params
from blip3o_jax.treepath import flatten
from blip3o_jax.types import Params

SAMPLED = 8  # values along an axis

Window = tuple[slice, ...]


def windows(config: Blip3oConfig) -> dict[str, Window]:
    """Returns path -> the sampled window of every parameter; it contains all layers of a stack."""

    def window(leaf: Any) -> Window:
        names = leaf.names if hasattr(leaf, "names") else (None,) * len(leaf.shape)
        return tuple(slice(None) if name == "layers" else slice(-SAMPLED, None) for name in names)

    return {path: window(leaf) for path, leaf in flatten(abstract_params(config)).items()}


def digest(sums: Mapping[str, Any]) -> str:
    """Returns twelve hex digits, by path -> `value_sum` of a leaf or its window."""
    lines = "".join(f"{path} {int(sums[path]):08x}\n" for path in sorted(sums))
    return hashlib.sha256(lines.encode()).hexdigest()[:12]


def identity_of(config: Blip3oConfig, params: Params) -> str:
    """Returns the identity of parameters, of numpy or jax arrays; to be called by all processes."""
    sampled = windows(config)

    @jax.jit
    def sums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {path: value_sum(leaf[sampled[path]]) for path, leaf in leaves.items()}

    leaves = flatten(params)  # a window of a window is the window itself
    on_host = {path: leaf[sampled[path]] for path, leaf in leaves.items() if not isinstance(leaf, jax.Array)}
    return digest(jax.device_get(sums(leaves | on_host)))


def value_sum(x: Any) -> Any:
    """Sums the hashed values of a numpy or jax array as rounded to bfloat16, exactly in any order.

    Returns:
      u32[].
    """
    bits = x.astype(jnp.bfloat16).view(jnp.uint16).astype(jnp.uint32) * np.uint32(0x9E3779B1)
    return ((bits ^ bits >> np.uint32(15)) * np.uint32(0x85EBCA77)).sum(dtype=jnp.uint32)
