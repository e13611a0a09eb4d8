"""Pre-norm vision transformer: the SigLIP2 tower of the image tokenizer, and its feature decoder.

B batch, Y X pixels, p patch size, C input channels, y x patches of the grid, T = y * x patches in raster order,
D width, N heads, H head dimension, P rows of the position table.

Source: transformers `SiglipVisionTransformer` (fixed size) and `Siglip2VisionTransformer` (patch size 1, positions
resized to the grid). Layer parameters are stacked on a leading axis.
Differs from the reference:
1. `depth` counts the layers that are run, so it is one less for consumers of the last but one hidden state.
2. There is no attention-pooling head.
3. Positions and residual sums are float32, whatever the dtype inside the blocks: fewer codes change in bfloat16.
4. A tower of depth 0, which the reference does not have, is the patch embedding alone, without positions.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from blip3o_jax.config import ViTConfig
from blip3o_jax.nn.attention import softmax_attention
from blip3o_jax.nn.linear import Linear, matmul
from blip3o_jax.nn.mlp import GeluMLP
from blip3o_jax.nn.norm import LayerNorm
from blip3o_jax.nn.parameters import numerics, parameter, torch_init
from blip3o_jax.nn.scan import scan_blocks
from blip3o_jax.sharding import constrain


class PatchEmbedding(nn.Module):
    """Linear map of every patch; pixels beyond the last whole patch are dropped.

    The kernel is stored as [p p C D], or as [C D] if p is 1.
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """[B Y X C] -> f32[B Y/p X/p D]."""
        c = self.config
        size, dtype = c.patch_size, jnp.dtype(c.dtype)
        shape = (size, size, c.in_channels) if size > 1 else (c.in_channels,)
        kernel = parameter(self, "kernel", torch_init(), (*shape, c.width), (None,) * len(shape) + ("embed",))
        bias = parameter(self, "bias", nn.initializers.zeros_init(), (c.width,), ("embed",))
        rows, columns = pixels.shape[1] // size, pixels.shape[2] // size
        kept = pixels[:, : rows * size, : columns * size]
        patches = rearrange(kept, "B (y p) (x q) C -> B y x (p q C)", p=size, q=size)
        return matmul(patches, kernel.reshape(-1, c.width), dtype) + bias.astype(dtype)


class PositionEmbedding(nn.Module):
    """Learned position table of a square grid, resized to other grids."""

    config: ViTConfig

    @nn.compact
    def __call__(self, rows: int, columns: int) -> jax.Array:
        """Returns f32[rows columns D]: the table, resampled if needed (bilinear, antialiased, corners not aligned)."""
        c = self.config
        side = math.isqrt(c.num_positions)
        table = parameter(self, "table", nn.initializers.normal(0.02), (c.num_positions, c.width), (None, "embed"))
        grid = table.astype(jnp.float32).reshape(side, side, c.width)
        return jax.image.resize(grid, (rows, columns, c.width), "bilinear", antialias=True)


class Attention(nn.Module):
    """Bidirectional self-attention with biases."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """dtype[B T D] -> dtype[B T D]."""
        c, kind = self.config, numerics(self.config)

        def project(name):
            y = Linear(c.width, ("embed", "heads"), name=name, **kind)(x)
            return rearrange(y, "B T (N H) -> B T N H", N=c.num_heads)

        query = constrain(project("query"), "batch", "length", "act_heads", None)
        key = constrain(project("key"), "batch", "length", "act_heads", None)
        value = constrain(project("value"), "batch", "length", "act_heads", None)
        out = softmax_attention(query, jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2))
        return Linear(c.width, ("heads", "embed"), name="out", **kind)(rearrange(out, "B T N H -> B T (N H)"))


class Block(nn.Module):
    """Pre-norm residual block."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f32[B T D] -> f32[B T D]."""
        c, kind = self.config, numerics(self.config)
        x = x + Attention(c, name="attention")(LayerNorm(c.norm_eps, "embed", name="norm1", **kind)(x))
        x = x + GeluMLP(c.mlp_dim, name="mlp", **kind)(LayerNorm(c.norm_eps, "embed", name="norm2", **kind)(x))
        return constrain(x, "batch", "length", "act_embed")


class SiglipVision(nn.Module):
    """Vision transformer over the patches of an image, or over the cells of a feature grid (patch size 1).

    With depth 0 there are no positions either, so the features of a patch depend on that patch only.
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Computes patch features.

        Args:
          pixels: [B Y X C], images in [-1, 1] or features.

        Returns:
          Patches in raster order: dtype[B T D] after the final norm, f32[B T D] if the configuration has none.
        """
        c = self.config
        x = PatchEmbedding(c, name="patch_embedding")(pixels)
        if c.depth:
            x = x + PositionEmbedding(c, name="position_embedding")(*x.shape[1:3])
        x = constrain(rearrange(x, "B y x D -> B (y x) D"), "batch", "length", "act_embed")
        if c.depth:
            layers = Block(c, name="layers")
            options = {"depth": c.depth, "remat": c.remat, "unroll": c.unroll}
            x, _ = scan_blocks(layers, lambda block, x, _: (block(x), None), x, None, **options)
        return LayerNorm(c.norm_eps, "embed", name="final_norm", **numerics(c))(x) if c.final_norm else x
