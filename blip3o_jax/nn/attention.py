"""Attention cores on split heads: softmax (grouped, masked) and ReLU linear attention.

B batch, T queries, S keys, N query heads, K key heads (N a multiple of K), G = N / K, H head dimension.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange

from blip3o_jax.nn.kernels import by_platform, matmul, one_device
from blip3o_jax.sharding import on_own_rows, shares_rows_only

MANY_SCORES = 256 * 256  # scores of one head from which CPU loops over heads and a GPU uses the fused kernel
LARGE_SCORES = 2**28  # bytes of scores per device, of several, from which accelerators also loop over key heads
MASKED = -1e30  # added to a score: exp(MASKED - max) is exactly 0 in float32


def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Computes scaled dot-product attention with a float32 softmax.

    Args:
      q: [B T N H].
      k: [B K S H], heads before positions, as in a cache.
      v: [B K S H].
      bias: added to the scores [B K G T S]: f32[B 1 1 T S], B or T may be 1; 0 = attend, MASKED = ignore.

    Returns:
      [B T N H] in q's dtype.
    """
    batch, length, heads, width = q.shape
    q = q.reshape(batch, length, k.shape[1], heads // k.shape[1], width)
    return _attend(q, k, v, bias).reshape(batch, length, heads, width)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Attends with queries [B T K G H]; other arguments as in `softmax_attention`."""
    mesh = jax.sharding.get_abstract_mesh()
    size = 4 * q.size // q.shape[-1] * k.shape[2] // (mesh.size or 1)  # bytes of the scores on one device
    whole = mesh.shape.get("tensor", 1) == 1 and not one_device()  # several devices, heads not partitioned
    branches = {"default": _by_key_head if whole and size >= LARGE_SCORES else _all_heads}
    if q.shape[1] * k.shape[2] >= MANY_SCORES:
        if one_device():
            branches["cpu"] = _head_by_head
        if shares_rows_only(len(q)) and _cudnn_takes(q, k, v, bias):
            branches["cuda"] = _cudnn
    return by_platform(q, k, v, bias, **branches) if len(branches) > 1 else branches["default"](q, k, v, bias)


def _all_heads(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    queries = "BTKGH"
    if q.shape[1] * k.shape[2] >= MANY_SCORES:  # else XLA puts T last, where a softmax takes a GPU three kernels
        queries, q = "BKGTH", q.transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum(f"{queries},BKSH->BKGTS", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    # transposed after rounding: XLA on CPU has no bfloat16 product with a transposed float32 result
    out = jnp.einsum("BKGTS,BKSH->BKGTH", weights, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).transpose(0, 3, 1, 2, 4)


def _by_key_head(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Does the same as `_all_heads` with the scores of one key head at a time; the backward pass recomputes them."""

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_head(own):
        q, k, v = own
        return _all_heads(q[:, :, None], k[:, None], v[:, None], bias)[:, :, 0]

    out = jax.lax.map(one_head, (jnp.moveaxis(q, 2, 0), k.swapaxes(0, 1), v.swapaxes(0, 1)))
    return jnp.moveaxis(out, 0, 2)


def _head_by_head(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Attends one key head at a time, by plain matrix products.

    XLA's batched product on CPU is 3 to 6 times as slow at 729 to 1024 tokens. The backward pass recomputes the scores,
    which is faster than storing those of all heads and layers.
    """
    batch, kv_heads = k.shape[:2]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one_head(inputs):
        q, k, v, row = inputs
        scores = matmul(q, k, q.dtype, transposed=True) * q.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + bias[row if bias.shape[0] > 1 else 0, 0]
        weights = jax.nn.softmax(scores, axis=-1)
        return matmul(weights, v, v.dtype).astype(q.dtype)

    rows = jnp.repeat(jnp.arange(batch), kv_heads)
    flat = (rearrange(x, "B K ... -> (B K) ...") for x in (jnp.transpose(q, (0, 2, 3, 1, 4)), k, v))
    out = jax.lax.map(one_head, (*flat, rows))
    return rearrange(out, "(B K) G T H -> B T K G H", B=batch)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Attends with cuDNN's fused kernel, which never stores the scores."""
    batch, length, _, _, width = q.shape
    if bias is not None:
        bias = jnp.broadcast_to(bias[:, 0], (batch, 1, length, k.shape[2])).astype(q.dtype)
    fused = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    heads = q.reshape(batch, length, -1, width), k.swapaxes(1, 2), v.swapaxes(1, 2)
    return on_own_rows(lambda _, *operands: fused(*operands), (), *heads, bias).reshape(q.shape)


def _cudnn_takes(*operands: jax.Array | None) -> bool:
    """Whether cuDNN is available here and supports these arrays, forward and backward."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), operands)
    try:
        jax.eval_shape(jax.grad(lambda *operands: _cudnn(*operands).astype(jnp.float32).sum()), *shapes)
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return True


def relu_linear_attention(q: jax.Array, k: jax.Array, v: jax.Array, eps: float = 1e-15) -> jax.Array:
    """Computes linear attention with ReLU features: out_t = sum_s v_s (k_s . q_t) / (sum_s k_s . q_t + eps).

    In float32 at the highest precision. Source: EfficientViT (arXiv 2205.14756), diffusers
    `SanaLinearAttnProcessor2_0` and `SanaMultiscaleLinearAttention.apply_linear_attention`.

    Args:
      q, k, v: [B S N H]; ReLU is applied to q and k here, in their own dtype.
      eps: added to the denominator.

    Returns:
      f32[B S N H].
    """
    q, k, v = (x.swapaxes(1, 2) for x in (jax.nn.relu(q), jax.nn.relu(k), v))  # heads first: faster on CPU
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    numerator, denominator = by_platform(q, k, v, cpu=_separate_sums, default=_joint_sums)
    return (numerator / (denominator + eps)).swapaxes(1, 2)


def _separate_sums(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns sum_s v_s (k_s . q_t) f32[B N T H] and sum_s k_s . q_t f32[B N T 1], of f32[B N S H]."""
    context = jnp.einsum("BNSH,BNSJ->BNHJ", k, v, precision="highest")
    numerator = jnp.einsum("BNTH,BNHJ->BNTJ", q, context, precision="highest")
    return numerator, jnp.einsum("BNTH,BNH->BNT", q, k.sum(axis=2), precision="highest")[..., None]


def _joint_sums(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Does the same with a column of ones beside v: three kernels fewer on a GPU."""
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1)
    context = jnp.einsum("BNSH,BNSJ->BNHJ", k, v, precision="highest")
    sums = jnp.einsum("BNTH,BNHJ->BNTJ", q, context, precision="highest")
    return sums[..., :-1], sums[..., -1:]
