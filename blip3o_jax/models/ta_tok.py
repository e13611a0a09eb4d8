"""TA-Tok image tokenizer: images to codes of a language-aligned codebook, and codes back to vision features.

B batch, P side of the input in pixels, N codes of one image, D width of the tower, Q codebook size, E code dimension.

Source: TA-Tok of Tar (arXiv 2506.18898), as BLIP3o-NEXT embeds it (`TextAlignedTokenizer`).
Differs from the reference:
1. The caller normalises pixels to [-1, 1]; there is no scaling layer.
2. Encoding does not run the feature decoder; call `decode` for it.
3. The pool scale is an argument, not an environment variable.
"""

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from blip3o_jax.config import TATokConfig
from blip3o_jax.errors import UserError, require
from blip3o_jax.models.siglip import SiglipVision
from blip3o_jax.models.vq import SimVQ, quantize
from blip3o_jax.nn.linear import Linear
from blip3o_jax.nn.parameters import numerics


@flax.struct.dataclass
class TATokOutput:
    """Codes of images with intermediate results."""

    indices: jax.Array  # i32[B N]
    features: jax.Array  # f32[B N D], after the task layer, for continuous conditioning
    quantized: jax.Array  # f32[B N E], unit codes with straight-through gradient, the input of `decode`
    z: jax.Array  # f32[B N E], unit vectors before quantisation
    codes: jax.Array  # f32[B N E], rows of the codebook, differentiable in it


class TATok(nn.Module):
    """Vision tower, pooling, task layer, SimVQ and feature decoder."""

    config: TATokConfig

    def setup(self):
        c, width, kind = self.config, self.config.encoder.width, numerics(self.config)
        self.encoder = SiglipVision(c.encoder)
        self.encode_task = Linear(width, ("embed", None), **kind)
        self.bottleneck_in = Linear(c.bottleneck_dim, ("embed", None), **kind)
        self.quantizer = SimVQ(c.codebook_size, c.bottleneck_dim, kind["param_dtype"])
        self.bottleneck_out = Linear(c.bottleneck_dim, ("embed", None), **kind)
        self.decoder = SiglipVision(c.decoder)
        self.decode_task_in = Linear(width, ("embed", "mlp"), **kind)
        self.decode_task_out = Linear(width, ("mlp", "embed"), **kind)

    def __call__(self, pixels: jax.Array, pool_scale: int = 1) -> tuple[TATokOutput, jax.Array]:
        """Encodes images, and decodes features from the codes; uses every parameter."""
        output = self.encode(pixels, pool_scale)
        return output, self.decode(output.quantized)

    def encode(
        self,
        pixels: jax.Array,
        pool_scale: int = 1,
        codebook: jax.Array | None = None,
        keys: jax.Array | None = None,
    ) -> TATokOutput:
        """Encodes square images to codes.

        Args:
          pixels: f32[B P P 3] in [-1, 1].
          pool_scale: patches along one side of the cell that a code covers: 1, 2 or 3.
          codebook: f32[Q E], result of `codebook()`; None computes it here, which costs as much as the tower.
          keys: key[B], one per image, to sample codes; None: the nearest codes.

        Raises:
          UserError: images of another size, or a pool scale that leaves no token.
        """
        return self.encode_tower(self.tower(pixels), pool_scale, codebook, keys)

    def features(self, pixels: jax.Array, pool_scale: int = 1) -> jax.Array:
        """Returns features dtype[B N D] after the task layer; arguments and errors as `encode`."""
        return self._pooled(self.tower(pixels), pool_scale)

    def tower(self, pixels: jax.Array) -> jax.Array:
        """Runs the vision tower, which all pool scales share: f32[B P P 3] -> [B T D], typed as by `SiglipVision`."""
        c = self.config
        expected = (c.image_size, c.image_size, c.encoder.in_channels)
        if pixels.ndim != 4 or pixels.shape[1:] != expected:
            raise UserError(
                "tokenizer pixels", got=f"shape {pixels.shape}", expected=f"[batch, {expected}]", do="resize them"
            )
        return self.encoder(pixels)

    def encode_tower(
        self,
        patches: jax.Array,
        pool_scale: int = 1,
        codebook: jax.Array | None = None,
        keys: jax.Array | None = None,
    ) -> TATokOutput:
        """Encodes the result [B T D] of `tower`; other arguments and errors as `encode`."""
        features = self._pooled(patches, pool_scale)
        codebook = self.codebook() if codebook is None else codebook
        found = quantize(self.bottleneck_in(features), codebook, keys, self.config.temperature)
        return TATokOutput(found.indices, features.astype(jnp.float32), found.quantized, found.z, found.codes)

    def _pooled(self, patches: jax.Array, pool_scale: int) -> jax.Array:
        grid = self.config.grid_size
        require(1 <= pool_scale <= grid, "pool_scale", pool_scale, f"1 to {grid}", "choose 1, 2 or 3")
        return jnp.tanh(self.encode_task(average_pool(patches, grid, pool_scale)))

    def codebook(self) -> jax.Array:
        """Returns the codebook f32[Q E], rows of unit length. Compute it once and pass it to `encode`."""
        return self.quantizer()

    def decode(self, quantized: jax.Array) -> jax.Array:
        """Decodes features f32[B N D] of the vision tower from codes f32[B N E], N a square number."""
        batch, length, _ = quantized.shape
        side = math.isqrt(length)
        require(side * side == length, "codes of an image", length, "a square number", "pass whole images")
        x = self.bottleneck_out(quantized)
        x = self.decoder(x.reshape(batch, side, side, x.shape[-1]))
        return self.decode_task_out(jnp.tanh(self.decode_task_in(x))).astype(jnp.float32)

    def decode_from_indices(self, indices: jax.Array) -> jax.Array:
        """Decodes features f32[B N D] from code indices i32[B N]."""
        return self.decode(jnp.take(self.codebook(), indices, axis=0))


def average_pool(x: jax.Array, side: int, scale: int) -> jax.Array:
    """Averages scale x scale cells of [B side*side D]; rows and columns beyond the last whole cell are dropped."""
    if scale == 1:
        return x
    kept = side // scale * scale
    grid = rearrange(x, "B (y x) D -> B y x D", y=side)[:, :kept, :kept]
    return reduce(grid, "B (y p) (x q) D -> B (y x) D", "mean", p=scale, q=scale)
