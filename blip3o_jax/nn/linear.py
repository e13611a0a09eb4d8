"""Linear layer and embedding table with logical axes.

B any leading dimensions, D input width, F output width, V rows.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.nn.kernels import matmul, take_rows
from blip3o_jax.nn.parameters import TORCH_INIT, Initializer, add_bias, parameter


class Linear(nn.Module):
    """`x @ kernel + bias`; kernel is stored [D F]. An adapter whose leaves stand beside the kernel is applied (`lora`).

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
        scale = self.get_variable("params", "kernel_scale")  # of an int8 kernel, see `nn.int8`; else None
        y = matmul(x, kernel if scale is None else kernel.astype(self.dtype), self.dtype)
        y = y if scale is None else y * scale
        if self.has_variable("params", "lora_a"):
            y = self._adapted(x, kernel, y)
        return add_bias(self, y.astype(self.dtype), self.axes[1])

    def _adapted(self, x: jax.Array, kernel: jax.Array, y: jax.Array) -> jax.Array:
        """`y = x @ kernel` with the change of a low-rank adapter, f32[... F]."""
        a, b, scale = (self.get_variable("params", f"lora_{name}") for name in ("a", "b", "scale"))
        y = y + scale * matmul(matmul(x, a, self.dtype), b, self.dtype)
        if not self.has_variable("params", "lora_magnitude"):
            return y
        norms = column_norms(kernel.astype(jnp.float32) + scale * (a @ b))  # a constant, as the method has it
        return y * (self.get_variable("params", "lora_magnitude") / jax.lax.stop_gradient(norms))


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


def column_norms(kernel: jax.Array) -> jax.Array:
    """f32[... F], Euclidean norms of the columns of kernels [... D F]."""
    return jnp.sqrt(jnp.square(kernel.astype(jnp.float32)).sum(axis=-2))


def row_logits(x: jax.Array, rows: jax.Array) -> jax.Array:
    """f32[... V] scores of [... D] against the rows [V D] of an output projection."""
    return matmul(x, rows, rows.dtype, transposed=True)


def chunk_size(most: int, length: int) -> int:
    """Positions whose scores are held at a time: as few chunks as do, of one size, so that little is filled up."""
    count = -(-length // most)
    return -(-length // count)
