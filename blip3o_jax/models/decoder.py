"""Qwen3-style causal decoder: grouped-query attention with normalised queries and keys, RoPE, SwiGLU.

B batch, T positions, S cache slots, D width, N query heads, K key heads, H head dimension, L layers, V vocabulary.

Source: transformers `Qwen3Model`, `Qwen3ForCausalLM`. Layer parameters are stacked on a leading axis L.
Differs from the reference:
1. RoPE is applied in float32 and rounded once; upstream rounds the tables to the activation dtype first.
2. Attention always takes a mask of valid positions and their position ids, so padding does not change a row.
3. Decoding runs the layers unrolled, with one cache array and one set of weights per layer: a step updates the cache in
   place and copies no weights.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from blip3o_jax.config import DecoderConfig
from blip3o_jax.nn.attention import MASKED, softmax_attention
from blip3o_jax.nn.few_rows import KeyValue, cached_layer
from blip3o_jax.nn.kernels import unstack
from blip3o_jax.nn.linear import Embedding, Linear, row_logits
from blip3o_jax.nn.mlp import SwiGLU
from blip3o_jax.nn.norm import RMSNorm
from blip3o_jax.nn.parameters import numerics
from blip3o_jax.nn.rope import apply_rope, rope_table
from blip3o_jax.nn.scan import scan_blocks
from blip3o_jax.nn.window import write_window
from blip3o_jax.sharding import constrain
from blip3o_jax.types import Params

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""(queries, keys, values) -> result, and keys and values to keep; see `Attention`."""


@flax.struct.dataclass
class Cache:
    """Key-value cache."""

    layers: tuple[KeyValue, ...]  # L pairs of dtype[B K S H]
    valid: jax.Array  # bool[B S], slots that may be attended to
    padding: jax.Array  # i32[B], slot of a position minus its position id

    def repeat(self, times: int) -> "Cache":
        """Repeats every row `times` times, so that the samples of a prompt share its prefill."""
        cache = jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), self)
        # the prompts may have been too few to shard
        return cache.replace(layers=jax.tree.map(lambda x: constrain(x, "batch", "kv_heads", None, None), cache.layers))


@flax.struct.dataclass
class DecodeWeights:
    """Weights of a decoding step, unstacked once."""

    layers: tuple[Params, ...]  # L parameter trees, one per block
    head: jax.Array  # [V' D], rows of the output projection that may be sampled


class Attention(nn.Module):
    """Grouped-query self-attention."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, attend: Attend) -> tuple[jax.Array, KeyValue]:
        """Applies the projections around `attend`.

        Args:
          x: dtype[B T D].
          cos, sin: f32[B T H/2].
          attend: takes queries dtype[B T N H], keys and values dtype[B K T H] of the rows; returns its result
            dtype[B T N H], and keys and values to keep.

        Returns:
          dtype[B T D], and what `attend` keeps.
        """
        c = self.config
        batch, length, _ = x.shape
        kind, norm = {"use_bias": False, **numerics(c)}, {"eps": c.norm_eps, **numerics(c)}

        def heads(name, count, axis):
            y = Linear(count * c.head_dim, ("embed", axis), name=name, **kind)(x)
            return y.reshape(batch, length, count, c.head_dim)

        query = apply_rope(RMSNorm(name="query_norm", **norm)(heads("query", c.num_heads, "heads")), cos, sin)
        key = apply_rope(RMSNorm(name="key_norm", **norm)(heads("key", c.num_kv_heads, "kv_heads")), cos, sin)
        value = heads("value", c.num_kv_heads, "kv_heads")
        out, kept = attend(query, jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2))
        out = out.reshape(batch, length, c.num_heads * c.head_dim)
        return Linear(c.width, ("heads", "embed"), name="out", **kind)(out), kept


class Block(nn.Module):
    """Pre-norm residual block."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: jax.Array, cos: jax.Array, sin: jax.Array, attend: Attend) -> tuple[jax.Array, KeyValue]:
        """Takes and returns the same as `Attention`."""
        c = self.config
        norm = {"eps": c.norm_eps, "axis": "embed", **numerics(c)}
        y, kept = Attention(c, name="attention")(RMSNorm(name="attention_norm", **norm)(x), cos, sin, attend)
        x = x + y
        x = x + SwiGLU(c.mlp_dim, name="mlp", **numerics(c))(RMSNorm(name="mlp_norm", **norm)(x))
        return constrain(x, "batch", "length", "act_embed"), kept


class Decoder(nn.Module):
    """Maps embeddings to hidden states after the final norm; `logits` maps these to the vocabulary."""

    config: DecoderConfig

    def setup(self):
        c = self.config
        self.embed = Embedding(c.vocab_size, c.width, **numerics(c))
        self.layers = Block(c)
        self.final_norm = RMSNorm(c.norm_eps, axis="embed", **numerics(c))
        if not c.tie_embeddings:
            self.lm_head = Embedding(c.vocab_size, c.width, **numerics(c))

    def __call__(self, x: jax.Array, positions: jax.Array, valid: jax.Array) -> jax.Array:
        """Computes the hidden states of whole sequences.

        Args:
          x: [B T D] embeddings.
          positions: i32[B T] position ids.
          valid: bool[B T], False for padding.

        Returns:
          dtype[B T D] after the final norm.
        """
        cos, sin = rope_table(positions, self.config.head_dim, self.config.rope_theta)
        x, _ = self._scan(_without_cache, x.astype(self.config.dtype), cos, sin, causal_bias(valid))
        return self._normalised(x)

    def prefill(self, x: jax.Array, positions: jax.Array, valid: jax.Array, slots: int) -> tuple[jax.Array, Cache]:
        """Computes the hidden states of prompts, and a cache of `slots` positions that holds them.

        Args:
          x: [B T D] embeddings, left-padded.
          positions: i32[B T] position ids.
          valid: bool[B T], False for padding.
          slots: S, at least T.
        """
        length = x.shape[1]
        cos, sin = rope_table(positions, self.config.head_dim, self.config.rope_theta)
        x, (keys, values) = self._scan(_with_cache, x.astype(self.config.dtype), cos, sin, causal_bias(valid))
        room = ((0, 0), (0, 0), (0, slots - length), (0, 0))
        layers = tuple((jnp.pad(keys[i], room), jnp.pad(values[i], room)) for i in range(self.config.depth))
        valid = jnp.pad(valid, ((0, 0), (0, slots - length)), constant_values=True)
        cache = Cache(layers, valid, length - 1 - positions[:, -1])
        return self._normalised(x), cache

    def branch(self, prompts: jax.Array, valid: jax.Array, x: jax.Array) -> jax.Array:
        """Computes the hidden states of continuations; each prompt is read once for all of its continuations.

        A prompt and its continuations are one row for all layers but attention, so that weights are read once.

        Args:
          prompts: [P T D] embeddings, left-padded.
          valid: bool[P T], False for padding.
          x: [B N D] embeddings of the continuations; the B / P rows of a prompt are adjacent.

        Returns:
          dtype[B 1+N D] after the final norm: of the prompt's last position and of the continuation.
        """
        c, (count, length, width), (rows, more, _) = self.config, prompts.shape, x.shape
        times = rows // count
        positions = jnp.cumsum(valid, axis=1) - 1  # any for padding
        after = positions[:, -1:] + jnp.tile(jnp.arange(1, more + 1), times)
        rope = rope_table(jnp.concatenate([positions, after], axis=1), c.head_dim, c.rope_theta)
        seen = jnp.concatenate([jnp.repeat(valid, times, axis=0), jnp.ones((rows, more), bool)], axis=1)
        together = jnp.concatenate([prompts, x.reshape(count, times * more, width)], axis=1).astype(c.dtype)
        together = constrain(together, "batch", "length", "act_embed")
        together, _ = self._scan(_branching, together, *rope, causal_bias(valid), causal_bias(seen)[..., length:, :])
        last = jnp.repeat(together[:, length - 1 : length], times, axis=0)
        return self._normalised(jnp.concatenate([last, together[:, length:].reshape(rows, more, width)], axis=1))

    def decode_weights(self, start: int = 0, size: int | None = None) -> DecodeWeights:
        """Returns the weights for `decode`, with `size` rows of the head from `start` on (all by default)."""
        layers = unstack(nn.meta.unbox(self.layers.variables["params"]))
        return DecodeWeights(layers, self._head().rows(start, size))

    def decode(self, x: jax.Array, cache: Cache, weights: DecodeWeights, slot: jax.Array) -> tuple[jax.Array, Cache]:
        """Computes the hidden states of W further tokens per row, and the updated cache; later slots are masked.

        Args:
          x: [B W D] embeddings.
          cache: keys and values of the preceding positions.
          weights: result of `decode_weights`.
          slot: i32[] or i32[B], cache slot of the first token.
        """
        slots = jnp.broadcast_to(slot, len(x))[:, None] + jnp.arange(x.shape[1])
        cos, sin = rope_table(slots - cache.padding[:, None], self.config.head_dim, self.config.rope_theta)
        seen = cache.valid[:, None] & (jnp.arange(cache.valid.shape[1]) <= slots[..., None])
        bias = jnp.where(seen, 0.0, MASKED)[:, None, None]
        block, eps = Block(self.config, parent=None), self.config.norm_eps

        def block_of(params, x, cos, sin, *cached):
            return block.apply({"params": params}, x, cos, sin, functools.partial(attend_to, *cached))

        x, layers = x.astype(self.config.dtype), []
        for params, past in zip(weights.layers, cache.layers, strict=True):
            x, kept = cached_layer(block_of, params, x, cos, sin, bias, past, slot, eps)
            layers.append(kept)
        return self._normalised(x), cache.replace(layers=tuple(layers))

    def logits(self, hidden: jax.Array, start: int = 0, size: int | None = None) -> jax.Array:
        """Returns logits f32[... size] of hidden [... D] for `size` vocabulary rows from `start` on (default all)."""
        return row_logits(hidden, self._head().rows(start, size))

    def head(self, start: int = 0, size: int | None = None) -> jax.Array:
        """Returns `size` rows dtype[size D] of the output projection from `start` on (all by default)."""
        return self._head().rows(start, size)

    def embed_tokens(self, ids: jax.Array) -> jax.Array:
        """Embeds token ids: i32[...] -> dtype[... D]."""
        return self.embed(ids)

    def init_all(self, tokens: jax.Array) -> jax.Array:
        """Touches every parameter: i32[B T] -> f32[B T V]. For `init` only."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return self.logits(self(self.embed(tokens), positions, jnp.ones_like(tokens, bool)))

    def _head(self) -> Embedding:
        return self.embed if self.config.tie_embeddings else self.lm_head

    def _normalised(self, x: jax.Array) -> jax.Array:
        return constrain(self.final_norm(x), "batch", "length", "act_embed")

    def _scan(self, function, x, *shared):
        c = self.config
        return scan_blocks(self.layers, function, x, None, *shared, depth=c.depth, remat=c.remat, unroll=c.unroll)


def _without_cache(block: Block, x, _, cos, sin, bias):
    return block(x, cos, sin, functools.partial(attend_to, bias, None, None))[0], None


def _with_cache(block: Block, x, _, cos, sin, bias):
    return block(x, cos, sin, functools.partial(attend_to, bias, None, None))


def _branching(block: Block, x, _, cos, sin, prompt_bias, bias):
    return block(x, cos, sin, functools.partial(_attend_branching, prompt_bias, bias))[0], None


def attend_to(
    bias: jax.Array,  # f32[B 1 1 T S], 0 or MASKED; S = T without a cache
    past: KeyValue | None,  # cached keys and values dtype[B K S H], overwritten from `slot` on
    slot: jax.Array | None,  # i32[] or i32[B]
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
) -> tuple[jax.Array, KeyValue]:
    """Attends to the rows themselves, or to a cache that they are written to; see `Attention`."""
    if past is not None:
        key, value = (write_window(old, new, slot, axis=2) for old, new in zip(past, (key, value), strict=True))
    query = constrain(query, "batch", "length", "act_heads", None)
    key, value = (constrain(y, "batch", "kv_heads", None, None) for y in (key, value))
    return softmax_attention(query, key, value, bias), (key, value)


def _attend_branching(
    prompt_bias: jax.Array,  # f32[P 1 1 T T]
    bias: jax.Array,  # f32[B 1 1 N T+N]
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
) -> tuple[jax.Array, None]:
    """Attends within prompts, and from each continuation to its prompt and itself; rows are those of `branch`."""
    count, (rows, _, _, more, _), length = len(query), bias.shape, prompt_bias.shape[-1]
    times, heads = rows // count, query.shape[2:]
    prompts, (own_key, own_value) = attend_to(
        prompt_bias, None, None, query[:, :length], key[:, :, :length], value[:, :, :length]
    )

    def whole(prompt, both):  # keys or values of a prompt and its continuation dtype[B K T+N H]
        kv_heads, width = both.shape[1], both.shape[3]
        own = both[:, :, length:].reshape(count, kv_heads, times, more, width).swapaxes(1, 2)
        own = own.reshape(rows, kv_heads, more, width)
        return jnp.concatenate([jnp.repeat(prompt, times, axis=0), own], axis=2)

    query = query[:, length:].reshape(rows, more, *heads)
    out, _ = attend_to(bias, None, None, query, whole(own_key, key), whole(own_value, value))
    return jnp.concatenate([prompts, out.reshape(count, times * more, *heads)], axis=1), None


def causal_bias(valid: jax.Array) -> jax.Array:
    """Returns f32[B 1 1 T T]: 0 where query t may attend to key s (s <= t and s valid), MASKED elsewhere."""
    length = valid.shape[1]
    allowed = jnp.tril(jnp.ones((length, length), bool)) & valid[:, None, :]
    return jnp.where(allowed, 0.0, MASKED)[:, None, None]
