"""Attention cores on split heads: softmax (grouped, masked) and ReLU linear attention.

B batch, T queries, S keys, N query heads, K key heads (N a multiple of K), G = N / K, H head dimension.
"""

import jax
import jax.numpy as jnp

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
    groups = heads // k.shape[1]
    scale = width**-0.5 if scale is None else scale
    q = q.reshape(batch, length, k.shape[1], groups, width)
    scores = jnp.einsum("BTKGH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores = scores + bias
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("BKGTS,BKSH->BTKGH", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(batch, length, heads, width)


def relu_linear_attention(q: jax.Array, k: jax.Array, v: jax.Array, eps: float = 1e-15) -> jax.Array:
    """Linear attention with ReLU features: out_t = sum_s v_s (k_s . q_t) / (sum_s k_s . q_t + eps).

    Computed in float32 at the highest precision. Source: EfficientViT (arXiv 2205.14756), diffusers
    `SanaLinearAttnProcessor2_0` and `SanaMultiscaleLinearAttention.apply_linear_attention`.

    Args:
      q, k, v: [B S N H]; ReLU is applied here, in their own dtype.

    Returns:
      f32[B S N H].
    """
    q = jax.nn.relu(q).astype(jnp.float32)
    k = jax.nn.relu(k).astype(jnp.float32)
    v = v.astype(jnp.float32)
    context = jnp.einsum("BSNH,BSNJ->BNHJ", k, v, precision="highest")
    numerator = jnp.einsum("BTNH,BNHJ->BTNJ", q, context, precision="highest")
    denominator = jnp.einsum("BTNH,BNH->BTN", q, k.sum(axis=1), precision="highest")
    return numerator / (denominator[..., None] + eps)
