"""PatchGAN discriminator: scores overlapping image patches as real or generated. Used in training only.

B batch, Y X pixels, C channels.

Source: Isola et al. 2017 (arXiv 1611.07004), `NLayerDiscriminator`: with width 64 and depth 3 a score sees 70x70
pixels.
Differs from the reference:
1. RMS norm over the channels instead of batch norm, so that a score does not depend on the rest of the batch.
"""

import dataclasses
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.config.schema import Range, Width
from blip3o_jax.nn.conv import Conv
from blip3o_jax.nn.norm import RMSNorm
from blip3o_jax.nn.parameters import numerics

KERNEL_SIZE = 4
MAX_GROWTH = 8  # width of the widest layer relative to the first


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Geometry; the numerics are those of the trained model."""

    width: Width = 64  # channels of the first layer; every further layer doubles them
    depth: Annotated[int, Range(1, 16)] = 3  # layers that halve the image


class Discriminator(nn.Module):
    """Strided 4x4 convolutions, followed by two without stride."""

    config: DiscriminatorConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Scores patches: f32[B Y X 3] in [-1, 1] -> f32[B Y' X'], positive for real images."""
        c, kind, x = self.config, numerics(self), pixels
        for i in range(c.depth + 1):
            width, first, stride = c.width * min(2**i, MAX_GROWTH), i == 0, 2 if i < c.depth else 1
            x = Conv(width, KERNEL_SIZE, stride, use_bias=first, name=f"conv_{i}", **kind)(x)
            if not first:
                x = RMSNorm(1e-6, use_bias=True, name=f"norm_{i}", **kind)(x)
            x = jax.nn.leaky_relu(x, 0.2)
        return Conv(1, KERNEL_SIZE, name="score", **kind)(x)[..., 0].astype(jnp.float32)


def smallest_side(config: DiscriminatorConfig) -> int:
    """Returns the smallest image side in pixels that gives a score; the last two layers remove a pixel each."""
    return 3 * 2**config.depth
