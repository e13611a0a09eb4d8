"""Linear layers and embedding table.

B any leading dimensions, D input width, F output width, V rows.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.nn.kernels import grouped_matmul, matmul, take_rows
from blip3o_jax.nn.parameters import Initializer, add_bias, parameter, torch_init


class Linear(nn.Module):
    """`x @ kernel + bias` with kernel [D F]; applies an adapter if its leaves are present beside the kernel (`lora`).

    Attributes:
      features: F.
      axes: logical names of the kernel's dimensions.
    """

    features: int
    axes: tuple[str | None, str | None]
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    kernel_init: Initializer = torch_init()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = parameter(self, "kernel", self.kernel_init, (x.shape[-1], self.features), self.axes)
        scale = self.get_variable("params", "kernel_scale")  # None unless the kernel is int8, see `nn.int8`
        y = matmul(x, kernel, self.dtype)
        y = y if scale is None else y * scale
        if self.has_variable("params", "lora_a"):
            y = self._adapted(x, kernel, y)
        return add_bias(self, y.astype(self.dtype), self.axes[1])

    def _adapted(self, x: jax.Array, kernel: jax.Array, y: jax.Array) -> jax.Array:
        """Adds the change of a low-rank adapter to `y = x @ kernel`, f32[... F]."""
        a, b, scale = (self.get_variable("params", f"lora_{name}") for name in ("a", "b", "scale"))
        y = y + scale * matmul(matmul(x, a, self.dtype), b, self.dtype)
        if not self.has_variable("params", "lora_magnitude"):
            return y
        magnitude = self.get_variable("params", "lora_magnitude")
        return y * column_factors(magnitude, kernel + scale * (a @ b))


class GroupedLinear(nn.Module):
    """A linear map within every `width` consecutive channels; kernel [G width width], no bias."""

    width: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[... C] -> dtype[... C] with C = G * width."""
        shape = (x.shape[-1] // self.width, self.width, self.width)
        kernel = parameter(self, "kernel", torch_init(batch_axis=(0,)), shape, ("heads", None, None))
        return grouped_matmul(x.astype(self.dtype), kernel.astype(self.dtype))


class Embedding(nn.Module):
    """Embedding table [V D], whose rows can also serve as the output projection."""

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
        return take_rows(self.table, ids).astype(self.dtype)  # not cast first: gradients of a row add up in float32

    def rows(self, start: int = 0, size: int | None = None) -> jax.Array:
        """Returns `size` rows dtype[size D] of the table from `start` on, all by default."""
        rows = self.table if size is None else jax.lax.slice_in_dim(self.table, start, start + size)
        return rows.astype(self.dtype)


def column_norms(kernel: jax.Array) -> jax.Array:
    """Returns the Euclidean norms f32[... F] of the columns of kernels [... D F]."""
    return jnp.sqrt(jnp.square(kernel.astype(jnp.float32)).sum(axis=-2))


def column_factors(magnitude: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns f32[... F], which scale the columns of kernels f32[... D F] to the norms `magnitude`, f32[... F].

    As in DoRA, the norms of the kernels are constant in the gradient. Columns of zeros stay zero.
    """
    norms = jax.lax.stop_gradient(column_norms(kernel))
    return magnitude / jnp.where(norms > 0, norms, 1)


def row_logits(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns logits f32[... V] of [... D] for the rows [V D] of an output projection."""
    return matmul(x, rows, rows.dtype, transposed=True)


def chunk_size(most: int, length: int) -> int:
    """Returns the size of the fewest equal chunks of at most `most` positions that cover `length`."""
    count = -(-length // most)
    return -(-length // count)
