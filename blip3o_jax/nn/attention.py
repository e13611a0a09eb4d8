"""Attention cores on split heads: softmax (grouped, masked) and ReLU linear attention.

B batch, T queries, S keys, N query heads, K key heads (N a multiple of K), G = N / K, H head dimension.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange

from blip3o_jax.nn.linear import matmul

MASKED = -1e30  # added to a score: exp(MASKED - max) is exactly 0 in float32
MANY_SCORES = 256 * 256  # of one head: from here on a loop over heads is worth its overhead on CPU


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
    scale = width**-0.5 if scale is None else scale
    q = q.reshape(batch, length, k.shape[1], heads // k.shape[1], width)
    mesh = jax.sharding.get_abstract_mesh()
    one_mask = bias is None or bias.shape[1:3] == (1, 1)
    one_cpu = jax.default_backend() == "cpu" and (mesh.empty or mesh.size == 1)
    loop = one_cpu and one_mask and length * k.shape[2] >= MANY_SCORES
    out = (_head_by_head if loop else _all_heads)(q, k, v, bias, scale)
    return out.reshape(batch, length, heads, width)


def _all_heads(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, scale: float) -> jax.Array:
    """[B T K G H] attention of queries [B T K G H]; the other arguments as in `softmax_attention`."""
    scores = jnp.einsum("BTKGH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores = scores + bias
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    # transposed only after rounding: XLA has no bfloat16 product with transposed float32 result on CPU
    out = jnp.einsum("BKGTS,BKSH->BKGTH", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).transpose(0, 3, 1, 2, 4)


def _head_by_head(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, scale: float) -> jax.Array:
    """`_all_heads` as a loop of plain matrix products, and with the scores of one key head at a time.

    XLA's batched product on CPU is 3 to 6 times slower than this at 729 to 1024 tokens. A gradient computes the scores
    anew: to keep those of all heads, and of all layers of a scan, takes longer.
    """
    batch, kv_heads = k.shape[:2]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(inputs):
        q, k, v, row = inputs
        scores = matmul(q, k, q.dtype, transposed=True) * scale
        if bias is not None:
            scores = scores + bias[row if bias.shape[0] > 1 else 0, 0]
        weights = jax.nn.softmax(scores, axis=-1)
        return matmul(weights, v, v.dtype).astype(q.dtype)

    rows = jnp.repeat(jnp.arange(batch), kv_heads)
    flat = (rearrange(x, "B K ... -> (B K) ...") for x in (jnp.transpose(q, (0, 2, 3, 1, 4)), k, v))
    out = jax.lax.map(attend, (*flat, rows))
    return rearrange(out, "(B K) G T H -> B T K G H", B=batch)


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
