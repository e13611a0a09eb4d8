"""SANA-1.5 diffusion transformer: predicts the velocity (noise - data) from noisy latent, timestep and condition.

B batch, b rows of one group, y x latent cells, T = y * x, C latent channels, D width, M condition tokens, E their
width, L blocks, N heads of the linear self-attention, K heads of the cross-attention, H head dimension.

Source: arXiv 2410.10629, 2501.18427; diffusers `SanaTransformer2DModel` without positional embedding, of patch size 1,
queries and keys normalised over all heads at once. Block parameters are stacked on a leading axis L.
Differs from the reference:
1. `encode_condition` computes everything that depends on the condition only (projection, norm, keys and values of every
   block) once, not at every step.
2. Condition tokens have optional weights, so that equal ones are attended to as one. With a single token the projected
   value is the result: it is computed once, and no queries are.
3. Modulation, gates and residual sums are computed in float32 and rounded once.
4. A model distilled to few steps (`config.mean_flow`) also embeds the interval of a step. The embedding of a zero
   interval is zero, so without an interval the same weights predict velocities.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from blip3o_jax.config import SanaConfig
from blip3o_jax.nn.attention import relu_linear_attention, softmax_attention
from blip3o_jax.nn.linear import Linear
from blip3o_jax.nn.mlp import GeluMLP, GLUMBConv
from blip3o_jax.nn.norm import RMSNorm, layer_normalize
from blip3o_jax.nn.parameters import Initializer, numerics, parameter, torch_init
from blip3o_jax.nn.scan import scan_blocks
from blip3o_jax.sharding import constrain, join_rows, split_rows

QK_NORM_EPS = 1e-5
CAPTION_NORM_EPS = 1e-5
OUT_NORM_EPS = 1e-6
TIMESTEP_CHANNELS = 256
INTERVAL_SCALE = 0.01  # factor of the interval before its features: keeps their derivatives small


@flax.struct.dataclass
class ConditionKV:
    """Keys and values of a condition for every block; b = 1 serves any number of rows.

    Attention to a single token is that token's projected value, whatever the query: it has no keys. If the parameters
    of the blocks are split (`nn.scan.split`), an array with leading axis L is a list of L arrays.
    """

    key: jax.Array | None  # dtype[L b K M H]; None: M = 1
    value: jax.Array  # dtype[L b K M H], or dtype[L b 1 D] for M = 1, projected
    log_weight: jax.Array | None  # f32[b M], log of the multiplicity of every token; None: 1


def timestep_features(t: jax.Array, channels: int = TIMESTEP_CHANNELS) -> jax.Array:
    """Maps f32[B] in [0, 1000] to f32[B channels]: cosines, then sines, of wavelengths from 2 pi to 2 pi * 1e4."""
    angles = t.astype(jnp.float32)[:, None] * _frequencies(channels // 2)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def feature_means(width: float, channels: int = TIMESTEP_CHANNELS) -> jax.Array:
    """Returns f32[channels], the factor by which a Gaussian blur of t with deviation `width` damps each feature."""
    return jnp.tile(jnp.exp(-jnp.square(_frequencies(channels // 2) * width) / 2), 2)


def _frequencies(count: int) -> jax.Array:
    return jnp.exp(-math.log(1e4) * jnp.arange(count, dtype=jnp.float32) / count)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Applies LayerNorm without affine part, then x * (1 + scale) + shift; [B T D] with f32[B 1 D], in x's dtype."""
    return (layer_normalize(x, eps) * (1 + scale) + shift).astype(x.dtype)


def add_gated(x: jax.Array, gate: jax.Array, y: jax.Array) -> jax.Array:
    """Returns x + gate * y in x's dtype; computed in float32, the dtype of the gate."""
    return (x + gate * y).astype(x.dtype)


class TimestepEmbedding(nn.Module):
    """Sinusoidal features of a time, linear, SiLU, linear."""

    config: SanaConfig
    scale: float
    last_init: Initializer = torch_init()

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        """f32[B] in [0, 1000] -> dtype[B D]."""
        c = self.config
        y = Linear(c.width, (None, "mlp"), name="in", **numerics(c))(timestep_features(t * self.scale))
        last = Linear(c.width, ("mlp", "embed"), name="out", kernel_init=self.last_init, **numerics(c))
        return last(jax.nn.silu(y))


class LinearSelfAttention(nn.Module):
    """ReLU linear attention among the latent cells."""

    config: SanaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """dtype[B T D] -> dtype[B T D]."""
        c, kind = self.config, numerics(self.config)
        norm = {"eps": QK_NORM_EPS, "axis": "heads", **kind}

        def project(name):
            return Linear(c.width, ("embed", "heads"), use_bias=False, name=name, **kind)(x)

        def heads(y):
            y = y.reshape(*y.shape[:2], c.num_heads, c.head_dim)
            return constrain(y, "batch", "length", "act_heads", None)

        query = heads(RMSNorm(name="query_norm", **norm)(project("query")))
        key = heads(RMSNorm(name="key_norm", **norm)(project("key")))
        out = relu_linear_attention(query, key, heads(project("value")))
        return Linear(c.width, ("heads", "embed"), name="out", **kind)(out.reshape(x.shape))


class CrossAttention(nn.Module):
    """Softmax attention of the latent cells to the condition, an unordered set of tokens without a mask."""

    config: SanaConfig

    def setup(self):
        c, kind = self.config, numerics(self.config)
        features = c.num_cross_heads * c.cross_head_dim
        norm = {"eps": QK_NORM_EPS, "axis": "heads", **kind}
        self.query = Linear(features, ("embed", "heads"), **kind)
        self.key = Linear(features, ("embed", "heads"), **kind)
        self.value = Linear(features, ("embed", "heads"), **kind)
        self.query_norm = RMSNorm(**norm)
        self.key_norm = RMSNorm(**norm)
        self.out = Linear(c.width, ("heads", "embed"), **kind)

    def encode(self, condition: jax.Array) -> tuple[jax.Array | None, jax.Array]:
        """dtype[b M D] -> keys and values dtype[b K M H], or None and dtype[b 1 D], see `ConditionKV`."""
        if condition.shape[1] == 1 and not self.is_initializing():
            return None, self.out(self.value(condition))

        def heads(y):
            y = self._split(y).swapaxes(1, 2)
            return constrain(y, "batch", "act_heads", "length", None)

        return heads(self.key_norm(self.key(condition))), heads(self.value(condition))

    def __call__(self, x: jax.Array, groups: tuple[ConditionKV, ...]) -> jax.Array:
        """Attends with len(groups) * b = B rows dtype[B T D]: row i to keys and values i // G of group i % G."""
        if len(groups) == 1:
            return self._attend(x, groups[0])
        parts = split_rows(x, len(groups))
        return join_rows(jnp.stack([self._attend(part, group) for part, group in zip(parts, groups, strict=True)]))

    def _attend(self, x: jax.Array, group: ConditionKV) -> jax.Array:
        batch, length, _ = x.shape
        if group.key is None:
            return jnp.broadcast_to(group.value, x.shape)
        key, value = (jnp.broadcast_to(y, (batch, *y.shape[1:])) for y in (group.key, group.value))
        bias = None if group.log_weight is None else group.log_weight[:, None, None, None, :]
        query = constrain(self._split(self.query_norm(self.query(x))), "batch", "length", "act_heads", None)
        return self.out(softmax_attention(query, key, value, bias).reshape(batch, length, -1))

    def _split(self, y: jax.Array) -> jax.Array:
        return y.reshape(*y.shape[:2], self.config.num_cross_heads, self.config.cross_head_dim)


class SanaBlock(nn.Module):
    """Linear self-attention, cross-attention and gated convolution; the timestep modulates the first and the last."""

    config: SanaConfig

    def setup(self):
        c = self.config
        self.self_attention = LinearSelfAttention(c)
        self.cross_attention = CrossAttention(c)
        self.feed_forward = GLUMBConv(int(c.mlp_ratio * c.width), c.width, **numerics(c))
        self.scale_shift_table = _table(self, 6)

    def __call__(
        self, x: jax.Array, modulation: jax.Array, groups: tuple[ConditionKV, ...], size: tuple[int, int]
    ) -> jax.Array:
        """Runs the block.

        Args:
          x: dtype[B T D].
          modulation: f32[B 6 D].
          groups: keys and values of this block, [b K M H].
          size: (y, x).

        Returns:
          dtype[B T D].
        """
        eps = self.config.norm_eps
        rows = jnp.split(modulation + self.scale_shift_table, 6, axis=1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = rows
        x = add_gated(x, gate, self.self_attention(modulate(x, shift, scale, eps)))
        x = x + self.cross_attention(x, groups)
        y = modulate(x, shift_mlp, scale_mlp, eps).reshape(x.shape[0], *size, x.shape[-1])
        x = add_gated(x, gate_mlp, self.feed_forward(y).reshape(x.shape))
        return constrain(x, "batch", "length", "act_embed")


class Sana(nn.Module):
    """The diffusion transformer, a `Denoiser`. Has no positional embedding, so it accepts latents of any size."""

    config: SanaConfig
    Config = SanaConfig

    def setup(self):
        c, kind = self.config, numerics(self.config)
        self.patch_embed = Linear(c.width, (None, "embed"), **kind)
        self.time_embed = TimestepEmbedding(c, c.timestep_scale)
        if c.mean_flow:  # initialised to have no effect
            self.interval_embed = TimestepEmbedding(c, INTERVAL_SCALE, nn.initializers.zeros_init())
        self.time_modulation = Linear(6 * c.width, ("embed", "mlp"), **kind)
        self.caption_projection = GeluMLP(c.width, c.width, **kind)
        self.caption_norm = RMSNorm(CAPTION_NORM_EPS, axis="embed", **kind)
        self.blocks = SanaBlock(c)
        self.scale_shift_table = _table(self, 2)
        self.proj_out = Linear(c.out_channels, ("embed", None), **kind)

    def encode_condition(self, condition: jax.Array, log_weight: jax.Array | None = None) -> ConditionKV:
        """Computes the keys and values of a condition for every block, once for all timesteps.

        Args:
          condition: [b M E]; b = 1 serves any number of rows.
          log_weight: f32[b M], log of the multiplicity of every token: N equal tokens are one with log N. None: 1.
        """
        tokens = self._tokens(condition)

        def encode(block, carry, _, tokens):
            return carry, block.cross_attention.encode(tokens)

        _, (key, value) = self._scan(encode, (), None, tokens)
        return ConditionKV(key, value, log_weight)

    def _tokens(self, condition: jax.Array) -> jax.Array:
        return self.caption_norm(self.caption_projection(condition))

    def __call__(
        self, x: jax.Array, t: jax.Array, conditions: tuple[ConditionKV, ...], interval: jax.Array | None = None
    ) -> jax.Array:
        """Predicts the velocity of a batch of len(conditions) equal groups, each with its own condition.

        Args:
          x: f32[B y x C].
          t: f32[B] in [0, 1000], 0 = data.
          conditions: results of `encode_condition`, one per group.
          interval: f32[B] in [0, t], with `config.mean_flow`: predict the mean velocity from t to t - interval. None: 0

        Returns:
          f32[B y x C], noise - data.
        """

        def groups(block, pairs, weights):
            return tuple(ConditionKV(*pair, weight) for pair, weight in zip(pairs, weights, strict=True))

        pairs = tuple((condition.key, condition.value) for condition in conditions)
        weights = tuple(condition.log_weight for condition in conditions)
        if (count := len(conditions)) == 1:
            return self._velocity(x, t, interval, groups, pairs, weights)
        # rows of the same image stand side by side and on one device, so that blocks exchange none between devices
        x, t, interval = jax.tree.map(lambda y: join_rows(y.reshape(count, -1, *y.shape[1:])), (x, t, interval))
        return split_rows(self._velocity(x, t, interval, groups, pairs, weights), count).reshape(x.shape)

    def denoise(self, x: jax.Array, t: jax.Array, condition: jax.Array, interval: jax.Array | None = None) -> jax.Array:
        """Predicts the velocity under one condition [B M E], encoded block by block; touches every parameter."""
        if self.is_initializing():
            return self(x, t, (self.encode_condition(condition),))

        def groups(block, _, tokens):
            return (ConditionKV(*block.cross_attention.encode(tokens), None),)

        return self._velocity(x, t, interval, groups, None, self._tokens(condition))

    def _velocity(
        self, x: jax.Array, t: jax.Array, interval: jax.Array | None, groups: Callable, own: Any, shared: Any
    ) -> jax.Array:
        """Implements `__call__`; `groups(block, own, shared)` gives a block's conditions, `own` has leading axis L."""
        c = self.config
        batch, height, width, _ = x.shape
        hidden = self.patch_embed(x).reshape(batch, height * width, c.width)
        hidden = constrain(hidden, "batch", "length", "act_embed")
        embedded = self.time_embed(t)
        if c.mean_flow and (interval is not None or self.is_initializing()):
            interval = jnp.zeros_like(t) if interval is None else interval
            embedded = embedded + (self.interval_embed(interval) - self.interval_embed(jnp.zeros(1)))
        modulation = self.time_modulation(jax.nn.silu(embedded)).astype(jnp.float32).reshape(batch, 6, c.width)

        def run(block, hidden, own, modulation, shared):
            return block(hidden, modulation, groups(block, own, shared), (height, width)), None

        hidden, _ = self._scan(run, hidden, own, modulation, shared)
        table = self.scale_shift_table + embedded.astype(jnp.float32)[:, None]
        hidden = modulate(hidden, *jnp.split(table, 2, axis=1), OUT_NORM_EPS)
        return self.proj_out(hidden).astype(jnp.float32).reshape(batch, height, width, c.out_channels)

    @staticmethod
    def flops(config: SanaConfig, cells: int, condition: int) -> tuple[float, float]:
        """Implements `Denoiser.flops`."""
        width, cross = config.width, config.num_cross_heads * config.cross_head_dim
        hidden = int(config.mlp_ratio * width)
        keys_and_values = 4 * condition * width * cross
        encoding = 2 * condition * width * (config.caption_channels + width) + config.depth * keys_and_values
        self_attention = 2 * cells * 4 * width * width + 4 * cells * width * config.head_dim
        cross_attention = 4 * cells * width * cross + 4 * cells * condition * cross
        feed_forward = 2 * cells * (3 * width * hidden + 9 * 2 * hidden)
        ends = 2 * cells * width * (config.in_channels + config.out_channels)
        return float(encoding), float(config.depth * (self_attention + cross_attention + feed_forward) + ends)

    def _scan(self, function, carry, inputs, *shared):
        c = self.config
        return scan_blocks(self.blocks, function, carry, inputs, *shared, depth=c.depth, remat=c.remat, unroll=c.unroll)


def _table(module: nn.Module, rows: int) -> jax.Array:
    width = module.config.width
    init = nn.initializers.normal(width**-0.5)
    return parameter(module, "scale_shift_table", init, (rows, width), (None, "embed"))
