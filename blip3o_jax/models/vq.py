"""SimVQ quantiser: nearest code by cosine similarity in a codebook that is a linear map of a fixed table.

B batch, N tokens of one image, Q codebook size, D code dimension.

Source: SimVQ (arXiv 2411.02038); the `simvq` regularizer of TA-Tok, l2-normalised and stochastic.
Differs from the reference:
1. Similarities are float32 at the highest precision; the reference takes the argmax of bfloat16 ones, where ties occur.
2. They are computed and reduced one block of the codebook at a time, so [B N Q] is never stored.
3. Codes are sampled only if keys are given; the reference samples whenever its module is in training mode.
4. Every image has its own key, so its codes do not depend on the rest of the batch.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from blip3o_jax.nn.linear import Embedding, Linear
from blip3o_jax.sharding import constrain

BLOCK = 8192  # codes per block: 24 MB of similarities per image of 729 tokens


@flax.struct.dataclass
class Quantized:
    """Codes of a batch, and the vectors that quantiser losses use."""

    indices: jax.Array  # i32[B N]
    z: jax.Array  # f32[B N D], the normalised input
    codes: jax.Array  # f32[B N D], codebook[indices]; differentiable in the codebook
    quantized: jax.Array  # f32[B N D], the codes with the gradient of z (straight-through)


class SimVQ(nn.Module):
    """Codebook: the normalised product of a table [Q D] and a projection."""

    codebook_size: int
    features: int
    param_dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.embedding = Embedding(self.codebook_size, self.features, param_dtype=self.param_dtype, stddev=1.0)
        self.projection = Linear(self.features, ("embed", None), param_dtype=self.param_dtype)

    def __call__(self) -> jax.Array:
        """Returns the effective codebook f32[Q D], rows of unit length; compute it once for fixed parameters."""
        with jax.default_matmul_precision("highest"):
            return normalize(self.projection(self.embedding(jnp.arange(self.codebook_size))))


def normalize(x: jax.Array) -> jax.Array:
    """Returns f32[... D] = x / |x| over the last axis."""
    x = x.astype(jnp.float32)
    # maximum under the root, so that the gradient at x = 0 is 0 and not NaN
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def quantize(
    z: jax.Array, codebook: jax.Array, keys: jax.Array | None = None, temperature: float = 0.03, block: int = BLOCK
) -> Quantized:
    """Replaces every vector by a row of the codebook.

    Args:
      z: [B N D]; vectors need not have unit length.
      codebook: f32[Q D], rows of unit length.
      keys: key[B], one per image, to sample codes from softmax(cosine / temperature). None: the nearest codes.
      temperature: at least 0; used with `keys` only.
      block: codes compared at a time.
    """
    z = normalize(z)
    indices = nearest_codes(jax.lax.stop_gradient(z), jax.lax.stop_gradient(codebook), keys, temperature, block)
    codes = jnp.take(codebook, indices, axis=0)
    return Quantized(indices, z, codes, z + jax.lax.stop_gradient(codes - z))


def nearest_codes(
    z: jax.Array, codebook: jax.Array, keys: jax.Array | None, temperature: float, block: int
) -> jax.Array:
    """Returns i32[B N], argmax of z . codebook (plus temperature * Gumbel noise with keys), lowest index on ties."""
    size, width = codebook.shape
    block = min(block, size)
    starts = jnp.arange(0, size, block)
    blocks = jnp.pad(codebook, ((0, -size % block), (0, 0))).reshape(-1, block, width)
    blocks = constrain(blocks, None, None, None)  # replicated: images are sharded, not codes

    def compare(best, rows_and_start):
        rows, start = rows_and_start
        score = jnp.einsum("BND,QD->BNQ", z, rows, precision="highest")
        if keys is not None:
            draw = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, start), score.shape[1:]))
            score = score + temperature * draw(keys)
        score = jnp.where(start + jnp.arange(block) < size, score, -jnp.inf)
        found = jnp.argmax(score, axis=-1)
        highest = jnp.max(score, axis=-1)
        return (jnp.maximum(best[0], highest), jnp.where(highest > best[0], start + found, best[1])), None

    worst = jnp.full(z.shape[:2], -jnp.inf), jnp.zeros(z.shape[:2], starts.dtype)
    (_, indices), _ = jax.lax.scan(compare, worst, (blocks, starts))
    return indices.astype(jnp.int32)
