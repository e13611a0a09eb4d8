"""Normalisation with float32 statistics.

Source: transformers `Qwen3RMSNorm`, diffusers `RMSNorm`, torch `LayerNorm`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.nn.kernels import spread
from blip3o_jax.nn.parameters import add_bias, parameter


def rms_normalize(x: jax.Array, eps: float) -> jax.Array:
    """Divides x by its root mean square over the last axis; returns f32[... C]."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


def layer_normalize(x: jax.Array, eps: float) -> jax.Array:
    """Normalises x to zero mean and unit variance over the last axis; returns f32[... C]."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis; casts to `dtype` before scaling, as upstream does."""

    eps: float
    axis: str | None = None  # logical name of the normalised dimension
    use_bias: bool = False
    gain: float = 1.0  # initial scale
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = rms_normalize(x, self.eps).astype(self.dtype)
        scale = parameter(self, "scale", nn.initializers.constant(self.gain), x.shape[-1:], (self.axis,))
        return add_bias(self, y * spread(scale, y), self.axis)


class LayerNorm(nn.Module):
    """Layer norm over the last axis with scale and bias."""

    eps: float
    axis: str | None = None
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    use_bias = True  # not a field: always on

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = layer_normalize(x, self.eps)
        scale = parameter(self, "scale", nn.initializers.ones_init(), x.shape[-1:], (self.axis,))
        return add_bias(self, y * spread(scale, y), self.axis).astype(self.dtype)
