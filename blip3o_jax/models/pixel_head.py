"""Maps the image tokenizer's decoded features to pixels, one patch per token. Used in tokenizer training only.

B batch, N tokens of a square grid, D feature width, p patch size, Y X pixels.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from blip3o_jax.nn.mlp import GeluMLP
from blip3o_jax.nn.parameters import numerics


class PixelHead(nn.Module):
    """Two linear layers with a GELU between them, applied to every token."""

    patch_size: int
    hidden: int
    channels: int = 3
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """[B N D], N a square number, in raster order -> f32[B Y X 3], about [-1, 1]; Y = X = p * sqrt(N)."""
        size = self.patch_size
        x = GeluMLP(self.hidden, size * size * self.channels, name="mlp", **numerics(self))(features)
        side = math.isqrt(x.shape[1])
        return rearrange(x, "B (y x) (p q C) -> B (y p) (x q) C", y=side, p=size, q=size).astype(jnp.float32)
