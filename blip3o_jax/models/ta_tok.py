"""TA-Tok: images to codes of a language-aligned codebook, and codes back to features of the vision tower.

B batch, P side of the input in pixels, N codes of one image, D width of the tower, Q codebook size, E code dimension.

Source: TA-Tok of Tar (arXiv 2506.18898), as BLIP3o-NEXT embeds it (`TextAlignedTokenizer`).
Differs from the reference:
1. The caller normalises pixels to [-1, 1]; there is no scaling layer.
2. Encoding does not run the feature decoder; `decode` does where it is wanted.
3. The pool scale is an argument only, not read from the environment.
"""

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from blip3o_jax.config import TATokConfig
from blip3o_jax.errors import UserError
from blip3o_jax.models.siglip import SiglipVision
from blip3o_jax.models.vq import Quantized, SimVQ, quantize
from blip3o_jax.nn.linear import Linear


@flax.struct.dataclass
class TATokOutput:
    """Codes of images, and the stages on the way to them."""

    indices: jax.Array  # i32[B N]
    features: jax.Array  # f32[B N D], after the task layer: what continuous conditioning uses
    quantized: jax.Array  # f32[B N E], unit codes with straight-through gradient: the input of `decode`
    z: jax.Array  # f32[B N E], what was quantised, of unit length
    codes: jax.Array  # f32[B N E], rows of the codebook, differentiable in it


class TATok(nn.Module):
    """Tower, pooling, task layer, SimVQ, feature decoder. Use `method=` for anything but initialisation."""

    config: TATokConfig

    def setup(self):
        c = self.config
        width, kind = c.encoder.width, {"dtype": jnp.dtype(c.dtype), "param_dtype": jnp.dtype(c.param_dtype)}
        self.encoder = SiglipVision(c.encoder)
        self.encode_task = Linear(width, ("embed", None), **kind)
        self.bottleneck_in = Linear(c.bottleneck_dim, ("embed", None), **kind)
        self.quantizer = SimVQ(c.codebook_size, c.bottleneck_dim, jnp.dtype(c.param_dtype))
        self.bottleneck_out = Linear(c.bottleneck_dim, ("embed", None), **kind)
        self.decoder = SiglipVision(c.decoder)
        self.decode_task_in = Linear(width, ("embed", "mlp"), **kind)
        self.decode_task_out = Linear(width, ("mlp", "embed"), **kind)

    def __call__(self, pixels: jax.Array, pool_scale: int = 1) -> tuple[TATokOutput, jax.Array]:
        """Codes of images and the features decoded from them: touches every parameter."""
        output = self.encode(pixels, pool_scale)
        return output, self.decode(output.quantized)

    def encode(
        self,
        pixels: jax.Array,
        pool_scale: int = 1,
        codebook: jax.Array | None = None,
        keys: jax.Array | None = None,
    ) -> TATokOutput:
        """Codes of square images.

        Args:
          pixels: f32[B P P 3] in [-1, 1].
          pool_scale: 1, 2 or 3: patches along one side of the cell that a code stands for.
          codebook: f32[Q E], result of `codebook()`; None: computed here, which costs as much as the tower does.
          keys: random keys [B], one per image, to draw codes; None: the nearest ones.

        Raises:
          UserError: images of another size, or a pool scale that leaves no token.
        """
        return self.encode_tower(self.tower(pixels), pool_scale, codebook, keys)

    def features(self, pixels: jax.Array, pool_scale: int = 1) -> jax.Array:
        """dtype[B N D] after the task layer, without looking for codes; arguments and errors as `encode`."""
        return self._pooled(self.tower(pixels), pool_scale)

    def tower(self, pixels: jax.Array) -> jax.Array:
        """dtype[B T D], patches of f32[B P P 3] after the vision tower: what all pool scales share."""
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
        """Codes of images after `tower`, dtype[B T D]; further arguments and errors as `encode`."""
        features = self._pooled(patches, pool_scale)
        codebook = self.codebook() if codebook is None else codebook
        found: Quantized = quantize(self.bottleneck_in(features), codebook, keys, self.config.temperature)
        return TATokOutput(found.indices, features.astype(jnp.float32), found.quantized, found.z, found.codes)

    def _pooled(self, patches: jax.Array, pool_scale: int) -> jax.Array:
        grid = self.config.grid_size
        if not 1 <= pool_scale <= grid:
            raise UserError("pool_scale", got=pool_scale, expected=f"1 to {grid}", do="choose 1, 2 or 3")
        return jnp.tanh(self.encode_task(average_pool(patches, grid, pool_scale)))

    def codebook(self) -> jax.Array:
        """f32[Q E], rows of unit length. Depends on the parameters alone: compute it once and pass it to `encode`."""
        return self.quantizer()

    def lookup(self, indices: jax.Array, codebook: jax.Array | None = None) -> jax.Array:
        """i32[B N] -> f32[B N E], rows of the codebook."""
        return jnp.take(self.codebook() if codebook is None else codebook, indices, axis=0)

    def decode(self, quantized: jax.Array) -> jax.Array:
        """Features of the tower from f32[B N E] codes, N a square number: f32[B N D]."""
        batch, length, _ = quantized.shape
        side = math.isqrt(length)
        if side * side != length:
            raise UserError("codes of an image", got=length, expected="a square number", do="pass whole images")
        x = self.bottleneck_out(quantized)
        x = self.decoder(x.reshape(batch, side, side, x.shape[-1]))
        return self.decode_task_out(jnp.tanh(self.decode_task_in(x))).astype(jnp.float32)

    def decode_from_indices(self, indices: jax.Array, codebook: jax.Array | None = None) -> jax.Array:
        """Features of the tower from codes i32[B N]: f32[B N D]."""
        return self.decode(self.lookup(indices, codebook))


def average_pool(x: jax.Array, side: int, scale: int) -> jax.Array:
    """Means of scale x scale cells of [B side*side D]; rows and columns beyond the last whole cell are dropped."""
    if scale == 1:
        return x
    batch, _, width = x.shape
    cells = side // scale
    grid = x.reshape(batch, side, side, width)[:, : cells * scale, : cells * scale].astype(jnp.float32)
    grid = grid.reshape(batch, cells, scale, cells, scale, width)
    return grid.mean(axis=(2, 4)).reshape(batch, cells * cells, width).astype(x.dtype)
