"""Kernels of linear layers in eight bits, a scale for every output channel: what `--dtype int8` holds in memory.

L stacked layers, D input width, F output width. `nn.linear.Linear` multiplies by int8[L D F] in the type that it
computes in, and what comes out by the `kernel_scale` f32[L F] beside it. Nothing else is quantised.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from blip3o_jax import treepath
from blip3o_jax.types import Params

LARGEST = 127


def quantize(params: Params, layers: Iterable[str]) -> Params:
    """The parameters with the kernels of some layers in int8.

    Args:
      params: of the model.
      layers: paths of linear layers.
    """
    leaves = treepath.flatten(params)
    del params
    for path in layers:
        if f"{path}/kernel" in leaves:
            leaves[f"{path}/kernel"], leaves[f"{path}/kernel_scale"] = _quantized(leaves[f"{path}/kernel"])
    return treepath.unflatten(leaves)


@jax.jit
def _quantized(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The nearest int8[L D F], and f32[L F], with which the largest entry of every column is LARGEST."""
    kernel = kernel.astype(jnp.float32)
    largest = jnp.abs(kernel).max(axis=-2)
    scale = jnp.where(largest > 0, largest, 1) / LARGEST
    return jnp.round(kernel / scale[..., None, :]).astype(jnp.int8), scale
