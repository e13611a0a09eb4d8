"""Deep-compression autoencoder: images to latents of 1/32 of their side, and back. Deterministic.

B batch, Y X pixels, y x latent cells, C channels of a level, S positions (y * x), N heads, H head dimension.

Source: DC-AE (arXiv 2410.10733), EfficientViT (arXiv 2205.14756); diffusers `AutoencoderDC` with strided-convolution
downsampling and nearest-neighbour upsampling, as the SANA-1.1 release configures it.
Parameter names number the entries of a level as upstream does: `encoder/down_0/{block_0,block_1,downsample_2}`,
`decoder/up_0/{upsample_0,block_1,...}`; level 0 has the full resolution on both sides.
Differs from the reference:
1. One attention formula at every size, in float32. With at most H positions the reference multiplies (k . q) before v,
   in its own dtype: equal up to rounding.
2. Upsampling convolutions work on the small image (`nn.conv.UpsampleConv`): equal up to rounding.
3. Inputs and outputs are float32, whatever the dtype inside.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.config import DCAEConfig
from blip3o_jax.errors import UserError
from blip3o_jax.nn.attention import relu_linear_attention
from blip3o_jax.nn.conv import Conv, DepthwiseConv, UpsampleConv
from blip3o_jax.nn.linear import GroupedLinear, Linear
from blip3o_jax.nn.mlp import GLUMBConv
from blip3o_jax.nn.norm import RMSNorm
from blip3o_jax.nn.parameters import numerics
from blip3o_jax.nn.resample import average_channels, downsample_shortcut, repeat_channels, upsample_shortcut
from blip3o_jax.nn.scan import POLICIES

NORM_EPS = 1e-5
GLU_EXPANSION = 4


class ResBlock(nn.Module):
    """x + norm(conv2(silu(conv1(x)))), of the same width."""

    config: DCAEConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B Y X C] -> [B Y X C]."""
        kind = numerics(self.config)
        y = jax.nn.silu(Conv(x.shape[-1], name="conv1", **kind)(x))
        y = Conv(x.shape[-1], use_bias=False, name="conv2", **kind)(y)
        return x + RMSNorm(NORM_EPS, use_bias=True, name="norm", **kind)(y)


class MultiscaleAttention(nn.Module):
    """ReLU linear attention over queries, keys and values at several scales, without the residual.

    As in the trained weights, heads are cut from the concatenation [q | k | v] of 3C channels: every 3H consecutive
    channels are query, key and value of a head, whichever projection they come from. Each further scale aggregates the
    concatenation over a window (depthwise, then within groups of H channels) and adds C / H heads.
    """

    config: DCAEConfig
    kernel_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B Y X C] -> [B Y X C]."""
        config, kind = self.config, numerics(self.config)
        batch, height, width, channels = x.shape
        projections = [
            Linear(channels, ("embed", "heads"), use_bias=False, name=name, **kind)(x)
            for name in ("query", "key", "value")
        ]
        qkv = jnp.concatenate(projections, axis=-1)
        scales = [qkv]
        for i, size in enumerate(self.kernel_sizes):
            y = DepthwiseConv(size, use_bias=False, axis="heads", name=f"depthwise_{i}", **kind)(qkv)
            scales.append(GroupedLinear(config.head_dim, name=f"grouped_{i}", **kind)(y))
        heads = jnp.concatenate(scales, axis=-1).reshape(batch, height * width, -1, 3, config.head_dim)
        out = relu_linear_attention(*(heads[:, :, :, i] for i in range(3)))
        out = out.reshape(batch, height, width, -1)
        return Linear(channels, ("heads", "embed"), use_bias=False, name="out", **kind)(out)


class EfficientViTBlock(nn.Module):
    """Multi-scale linear attention and a gated depthwise feed-forward layer, each normalised before its residual."""

    config: DCAEConfig
    kernel_sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B Y X C] -> [B Y X C]."""
        channels, kind = x.shape[-1], numerics(self.config)
        y = MultiscaleAttention(self.config, self.kernel_sizes, name="attention")(x)
        x = x + RMSNorm(NORM_EPS, use_bias=True, name="attention_norm", **kind)(y)
        y = GLUMBConv(GLU_EXPANSION * channels, channels, name="feed_forward", **kind)(x)
        return x + RMSNorm(NORM_EPS, use_bias=True, name="feed_forward_norm", **kind)(y)


class Level(nn.Module):
    """The blocks of one resolution, after upsampling to `upsample` channels or before downsampling to `downsample`."""

    config: DCAEConfig
    block: str  # "ResBlock" | "EfficientViTBlock"
    num_blocks: int
    kernel_sizes: tuple[int, ...]
    upsample: int | None = None
    downsample: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B Y X C] -> [B Y X C], [B 2Y 2X upsample] or [B Y/2 X/2 downsample]."""
        kind, entry = numerics(self.config), 0
        if self.upsample is not None:
            x = UpsampleConv(self.upsample, name="upsample_0", **kind)(x) + upsample_shortcut(x, self.upsample)
            entry = 1
        for _ in range(self.num_blocks):
            if self.block == "ResBlock":
                x = _rematerialized(ResBlock, self.config)(self.config, name=f"block_{entry}")(x)
            else:
                block = _rematerialized(EfficientViTBlock, self.config)
                x = block(self.config, self.kernel_sizes, name=f"block_{entry}")(x)
            entry += 1
        if self.downsample is not None:
            y = Conv(self.downsample, stride=2, name=f"downsample_{entry}", **kind)(x)
            x = y + downsample_shortcut(x, self.downsample)
        return x


class Encoder(nn.Module):
    """Encodes images to latents."""

    config: DCAEConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B Y X 3] -> [B y x C]."""
        config, kind = self.config, numerics(self.config)
        widths, depths = config.encoder_channels, config.encoder_layers
        if depths[0]:
            x = Conv(widths[0], name="conv_in", **kind)(x)
        else:  # no blocks at full resolution
            x = Conv(widths[1], stride=2, name="downsample_in", **kind)(x)
        for i, depth in enumerate(depths):
            if depth:
                below = widths[i + 1] if i + 1 < len(widths) else None
                kernel_sizes = config.encoder_multiscales[i]
                level = Level(config, config.encoder_blocks[i], depth, kernel_sizes, downsample=below, name=f"down_{i}")
                x = level(x)
        latent = Conv(config.latent_channels, name="conv_out", **kind)(x)
        return latent + average_channels(x, config.latent_channels)


class Decoder(nn.Module):
    """Decodes latents to images."""

    config: DCAEConfig

    @nn.compact
    def __call__(self, latent: jax.Array) -> jax.Array:
        """[B y x C] -> [B Y X 3]."""
        config, kind = self.config, numerics(self.config)
        widths, depths = config.decoder_channels, config.decoder_layers
        x = Conv(widths[-1], name="conv_in", **kind)(latent) + repeat_channels(latent, widths[-1])
        for i, depth in reversed(list(enumerate(depths))):
            if depth:
                above = widths[i] if i + 1 < len(widths) else None
                kernel_sizes = config.decoder_multiscales[i]
                x = Level(config, config.decoder_blocks[i], depth, kernel_sizes, upsample=above, name=f"up_{i}")(x)
        x = jax.nn.relu(RMSNorm(NORM_EPS, use_bias=True, name="norm_out", **kind)(x))
        if depths[0]:
            return Conv(config.in_channels, name="conv_out", **kind)(x)
        return UpsampleConv(config.in_channels, name="upsample_out", **kind)(x)


class DCAE(nn.Module):
    """The autoencoder: `encode` and `decode`, and the same with scaled latents, which the diffusion model uses."""

    config: DCAEConfig

    def setup(self):
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def init_all(self, pixels: jax.Array) -> jax.Array:
        """Uses every parameter: f32[B Y X 3] -> f32[B Y X 3]. For `init` only."""
        return self.decode(self.encode(pixels))

    def encode(self, pixels: jax.Array) -> jax.Array:
        """Encodes images to unscaled latents.

        Args:
          pixels: f32[B Y X 3] in [-1, 1]; Y and X multiples of `config.spatial_factor`.

        Returns:
          f32[B y x C].

        Raises:
          UserError: Y or X is not such a multiple.
        """
        height, width, factor = *pixels.shape[1:3], self.config.spatial_factor
        if height % factor or width % factor or not height or not width:
            raise UserError(
                "image size",
                got=f"{width}x{height}",
                expected=f"multiples of {factor}, the side of a latent cell",
                do="resize or crop it",
            )
        return self.encoder(pixels).astype(jnp.float32)

    def decode(self, latent: jax.Array) -> jax.Array:
        """Decodes unscaled latents f32[B y x C] to images f32[B Y X 3], nominally in [-1, 1] but not clipped."""
        return self.decoder(latent.astype(self.config.dtype)).astype(jnp.float32)

    def encode_scaled(self, pixels: jax.Array) -> jax.Array:
        """Encodes images to scaled latents, of about unit variance."""
        return self.encode(pixels) * self.config.scaling_factor

    def decode_scaled(self, latent: jax.Array) -> jax.Array:
        """Decodes scaled latents."""
        return self.decode(latent / self.config.scaling_factor)


def _rematerialized(block: type[nn.Module], config: DCAEConfig) -> type[nn.Module]:
    return block if config.remat == "none" else nn.remat(block, policy=POLICIES[config.remat])
