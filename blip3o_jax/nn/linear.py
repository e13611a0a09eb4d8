"""Linear layer and embedding table with logical axes.

B any leading dimensions, D input width, F output width, V rows.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

Initializer = Callable[..., jax.Array]


def matmul(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x[... D] @ kernel[D F]`, accumulated in float32, returned in `dtype`."""
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    product = jax.lax.dot_general(
        x, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.promote_types(dtype, jnp.float32)
    )
    return product.astype(dtype)


class Linear(nn.Module):
    """`x @ kernel + bias`; kernel is stored [D F].

    Attributes:
      features: F.
      axes: logical names of the kernel's two dimensions.
    """

    features: int
    axes: tuple[str | None, str | None]
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's default

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(self.kernel_init, self.axes),
            (x.shape[-1], self.features),
            self.param_dtype,
        )
        y = matmul(x, kernel, self.dtype)
        if self.use_bias:
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[1:])
            y = y + self.param("bias", init, (self.features,), self.param_dtype).astype(self.dtype)
        return y


class Embedding(nn.Module):
    """Table [V D] looked up by id, and its transpose as an output projection."""

    num_rows: int
    features: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    stddev: float = 0.02

    def setup(self):
        self.table = self.param(
            "table",
            nn.with_logical_partitioning(nn.initializers.normal(self.stddev), ("vocab", "embed")),
            (self.num_rows, self.features),
            self.param_dtype,
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        """i32[...] -> dtype[... D]."""
        return jnp.take(self.table, ids, axis=0).astype(self.dtype)

    def attend(self, x: jax.Array, start: int = 0, size: int | None = None) -> jax.Array:
        """Logits f32[... size] of dtype[... D] against rows start, start + 1, ..., all of them by default."""
        rows = self.table if size is None else jax.lax.slice_in_dim(self.table, start, start + size)
        return jnp.einsum(
            "...D,VD->...V", x.astype(self.dtype), rows.astype(self.dtype), preferred_element_type=jnp.float32
        )
