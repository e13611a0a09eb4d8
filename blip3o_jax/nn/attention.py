"""Attention cores on split heads: softmax (grouped, masked) and ReLU linear attention.

B batch, T queries, S keys, N query heads, K key heads (N a multiple of K), G = N / K, H head dimension.
"""

import jax
import jax.numpy as jnp

from blip3o_jax.nn.kernels import attend

MASKED = -1e30  # added to a score: exp(MASKED - max) is exactly 0 in float32


def softmax_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None, scale: float | None = None
) -> jax.Array:
    """Scaled dot-product attention with a float32 softmax.

    Args:
      q: [B T N H].
      k: [B K S H], heads before positions, as a cache holds them.
      v: [B K S H].
      bias: f32, broadcast against the scores [B K G T S]; 0 = attend, MASKED = do not.
      scale: of the scores, default H ** -0.5.

    Returns:
      [B T N H] in q's dtype.
    """
    batch, length, heads, width = q.shape
    q = q.reshape(batch, length, k.shape[1], heads // k.shape[1], width)
    return attend(q, k, v, bias, width**-0.5 if scale is None else scale).reshape(batch, length, heads, width)


def relu_linear_attention(q: jax.Array, k: jax.Array, v: jax.Array, eps: float = 1e-15) -> jax.Array:
    """Linear attention with ReLU features: out_t = sum_s v_s (k_s . q_t) / (sum_s k_s . q_t + eps).

    Computed in float32 at the highest precision. Source: EfficientViT (arXiv 2205.14756), diffusers
    `SanaLinearAttnProcessor2_0` and `SanaMultiscaleLinearAttention.apply_linear_attention`.

    Args:
      q, k, v: [B S N H]; ReLU is applied here, in their own dtype.

    Returns:
      f32[B S N H].
    """
    q, k, v = (x.swapaxes(1, 2) for x in (jax.nn.relu(q), jax.nn.relu(k), v))  # products of whole heads: faster on CPU
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    context = jnp.einsum("BNSH,BNSJ->BNHJ", k, v, precision="highest")
    numerator = jnp.einsum("BNTH,BNHJ->BNTJ", q, context, precision="highest")
    denominator = jnp.einsum("BNTH,BNH->BNT", q, k.sum(axis=2), precision="highest")
    return (numerator / (denominator[..., None] + eps)).swapaxes(1, 2)
