"""Linear layer and embedding table with logical axes.

B any leading dimensions, D input width, F output width, V rows.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.nn.kernels import matmul, take_rows
from blip3o_jax.nn.parameters import TORCH_INIT, Initializer, add_bias, parameter


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
    kernel_init: Initializer = TORCH_INIT

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = parameter(self, "kernel", self.kernel_init, (x.shape[-1], self.features), self.axes)
        return add_bias(self, matmul(x, kernel, self.dtype).astype(self.dtype), self.axes[1])


class Embedding(nn.Module):
    """Table [V D] looked up by id; its rows serve as an output projection too."""

    num_rows: int
    features: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    stddev: float = 0.02

    def setup(self):
        init = nn.initializers.normal(self.stddev)
        self.table = parameter(self, "table", init, (self.num_rows, self.features), ("vocab", "embed"))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """i32[...] -> dtype[... D]."""
        return take_rows(self.table, ids).astype(self.dtype)

    def rows(self, start: int = 0, size: int | None = None) -> jax.Array:
        """dtype[size D]: rows start, start + 1, ... of the table, all of them by default."""
        rows = self.table if size is None else jax.lax.slice_in_dim(self.table, start, start + size)
        return rows.astype(self.dtype)


def row_logits(x: jax.Array, rows: jax.Array) -> jax.Array:
    """f32[... V] scores of [... D] against the rows [V D] of an output projection."""
    return matmul(x, rows, rows.dtype, transposed=True)


def chunk_size(most: int, length: int) -> int:
    """Positions whose scores are held at a time: as few chunks as do, of one size, so that little is filled up."""
    count = -(-length // most)
    return -(-length // count)
