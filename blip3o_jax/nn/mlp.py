"""Feed-forward layers: SwiGLU, GELU and the gated depthwise convolution of SANA and DC-AE.

D width, F hidden width, Y X pixels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.nn.conv import DepthwiseConv
from blip3o_jax.nn.linear import Linear
from blip3o_jax.nn.parameters import numerics
from blip3o_jax.sharding import constrain


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), no biases. Source: transformers `Qwen3MLP`."""

    hidden: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kind = {"use_bias": False, **numerics(self)}
        gate = Linear(self.hidden, ("embed", "mlp"), name="gate", **kind)(x)
        up = Linear(self.hidden, ("embed", "mlp"), name="up", **kind)(x)
        y = constrain(jax.nn.silu(gate) * up, "batch", "length", "act_mlp")
        return Linear(x.shape[-1], ("mlp", "embed"), name="down", **kind)(y)


class GeluMLP(nn.Module):
    """Linear, tanh-approximated GELU, Linear, with biases. Source: transformers `SiglipMLP`."""

    hidden: int
    features: int | None = None  # default: the input's width
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kind = numerics(self)
        y = Linear(self.hidden, ("embed", "mlp"), name="in", **kind)(x)
        y = jax.nn.gelu(y, approximate=True)
        return Linear(self.features or x.shape[-1], ("mlp", "embed"), name="out", **kind)(y)


class GLUMBConv(nn.Module):
    """1x1 expansion, SiLU, 3x3 depthwise convolution, value * silu(gate) of its two halves, 1x1 projection.

    Has no norm and no residual. Source: diffusers `GLUMBConv`.
    """

    hidden: int  # channels after the gate; the expansion has twice as many
    features: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B Y X D] -> [B Y X features]."""
        kind = numerics(self)
        y = jax.nn.silu(Linear(2 * self.hidden, ("embed", "mlp"), name="expand", **kind)(x))
        y = DepthwiseConv(3, axis="mlp", name="depthwise", **kind)(y)
        value, gate = jnp.split(y, 2, axis=-1)
        return Linear(self.features, ("mlp", "embed"), use_bias=False, name="project", **kind)(
            value * jax.nn.silu(gate)
        )
