"""Weight-only int8 quantisation of linear layers with a scale per output channel, for `--dtype int8`.

L stacked layers, D input width, F output width. `nn.linear.Linear` converts the kernel int8[L D F] to its compute dtype
and multiplies the result by `kernel_scale` f32[L F]. Nothing else is quantised.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from blip3o_jax import treepath
from blip3o_jax.types import Params

LARGEST = 127


def quantize(params: Params, layers: Iterable[str]) -> Params:
    """Quantises the kernels of linear layers.

    Args:
      params: parameters of the model.
      layers: paths of the layers; missing ones are skipped.
    """
    leaves = treepath.flatten(params)
    del params
    for path in layers:
        if f"{path}/kernel" in leaves:
            leaves[f"{path}/kernel"], leaves[f"{path}/kernel_scale"] = _quantized(leaves[f"{path}/kernel"])
    return treepath.unflatten(leaves)


@jax.jit
def _quantized(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns int8[L D F] and scales f32[L F] that map the largest entry of every column to LARGEST."""
    kernel = kernel.astype(jnp.float32)
    largest = jnp.abs(kernel).max(axis=-2)
    scale = jnp.where(largest > 0, largest, 1) / LARGEST
    return jnp.round(kernel / scale[..., None, :]).astype(jnp.int8), scale
