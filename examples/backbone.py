"""A diffusion backbone of your own: a plain transformer over latent cells and condition tokens.

python train.py --config=examples/backbone.py --workdir=runs/backbone
python sample.py --checkpoint=runs/backbone/model --backbone=examples.backbone:Transformer --prompt="a red circle"

`blip3o_jax/models/protocols.py` says what a backbone has to offer.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.config import BackboneConfig
from blip3o_jax.config.schema import Depth, Width


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(BackboneConfig):
    """The section `model.dit`."""

    width: Width = 64
    depth: Depth = 2
    num_heads: Width = 4


class Block(nn.Module):
    """Cells attend to each other and to the condition, then an MLP; both normalised and shifted by the timestep."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, condition: jax.Array, log_weight: jax.Array) -> jax.Array:
        c, heads = self.config, (*x.shape[:1], -1, self.config.num_heads, self.config.width // self.config.num_heads)
        cells = nn.LayerNorm(name="norm")(x) + nn.Dense(c.width, name="shift")(time)
        key, value = (
            jnp.concatenate([nn.Dense(c.width, name=f"cell_{name}")(cells), nn.Dense(c.width, name=name)(condition)], 1)
            for name in ("key", "value")
        )
        weight = jnp.concatenate([jnp.zeros(x.shape[:2]), log_weight], axis=1)  # equal tokens come as one
        query = nn.Dense(c.width, name="query")(cells).reshape(heads)
        mixed = nn.dot_product_attention(query, key.reshape(heads), value.reshape(heads), weight[:, None, None, :])
        x = x + nn.Dense(c.width, name="out")(mixed.reshape(x.shape))
        y = nn.LayerNorm(name="mlp_norm")(x) + nn.Dense(c.width, name="mlp_shift")(time)
        return x + nn.Dense(c.width, name="down")(nn.gelu(nn.Dense(4 * c.width, name="up")(y)))


class Transformer(nn.Module):
    """Implements `models.protocols.Denoiser`."""

    config: Config
    Config = Config

    def setup(self):
        self.caption = nn.Dense(self.config.width)
        self.cell = nn.Dense(self.config.width)
        self.time = nn.Dense(self.config.width)
        self.blocks = [Block(self.config) for _ in range(self.config.depth)]
        self.velocity = nn.Dense(self.config.in_channels)

    def encode_condition(self, condition, log_weight=None):
        log_weight = jnp.zeros(condition.shape[:2]) if log_weight is None else log_weight
        return self.caption(condition), log_weight

    def __call__(self, x, t, conditions):
        rows = zip(jnp.split(x, len(conditions)), jnp.split(t, len(conditions)), conditions, strict=True)
        return jnp.concatenate([self._group(*group) for group in rows])

    def denoise(self, x, t, condition):
        return self(x, t, (self.encode_condition(condition),))

    def _group(self, x, t, encoded):
        """Velocity f32[b y x C] of rows that share a condition; one of batch 1 serves them all."""
        batch, height, width, channels = x.shape
        condition, log_weight = (jnp.broadcast_to(part, (batch, *part.shape[1:])) for part in encoded)
        place = jnp.stack(jnp.meshgrid(jnp.linspace(-1, 1, height), jnp.linspace(-1, 1, width), indexing="ij"), -1)
        place = jnp.broadcast_to(place, (batch, height, width, 2))
        cells = self.cell(jnp.concatenate([x, place], axis=-1).reshape(batch, height * width, channels + 2))
        angles = t[:, None, None] / 1000 * 2 ** jnp.arange(8.0)
        time = nn.silu(self.time(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)))
        for block in self.blocks:
            cells = block(cells, time, condition, log_weight)
        return self.velocity(cells).astype(jnp.float32).reshape(x.shape)

    @staticmethod
    def flops(config, cells, condition):
        encoding = 2.0 * condition * config.caption_channels * config.width
        attention = 4.0 * config.width * (2 * condition + cells * (cells + condition))
        return encoding, config.depth * (24.0 * cells * config.width**2 + attention)


def get_config():
    """The `pretrain` stage of configs/tiny.py with this backbone in the place of SANA."""
    from configs import tiny

    config = tiny.get_config("pretrain")
    config.model.dit = {"name": "examples.backbone:Transformer", "in_channels": 32, "caption_channels": 96}
    return config
