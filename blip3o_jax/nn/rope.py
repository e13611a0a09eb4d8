"""Rotary position embedding, rotate-half convention (first half of the head with the second).

B batch, T positions, N heads, H head dimension. Source: arXiv 2104.09864; transformers `Qwen3RotaryEmbedding`.
"""

import jax
import jax.numpy as jnp


def rope_table(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines for positions.

    Args:
      positions: i32[B T].
      head_dim: H, even.
      theta: base of the wavelengths.

    Returns:
      cos, sin: f32[B T H/2].
    """
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angles = positions.astype(jnp.float32)[..., None] / theta**exponents  # products in float32: exact at any precision
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates `x[B T N H]` by the tables `[B T H/2]`; computed in float32, returned in x's dtype."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
