"""Declaration of layer parameters with logical axis names."""

import contextlib
import contextvars
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.nn.kernels import spread

Initializer = Callable[..., jax.Array]
torch_init = functools.partial(nn.initializers.variance_scaling, 1 / 3, "fan_in", "uniform")
"""torch's default for kernels: uniform up to the inverse root of the number of inputs of an output."""

_shapes_alone = contextvars.ContextVar("shapes_alone", default=False)


@contextlib.contextmanager
def shapes_alone():
    """Initialises parameters to zeros within the context, for fast shape inference: tracing random numbers is slow."""
    token = _shapes_alone.set(True)
    try:
        yield
    finally:
        _shapes_alone.reset(token)


def numerics(module: Any) -> dict[str, jnp.dtype]:
    """Returns the keyword arguments `dtype` and `param_dtype` of a layer, from those of its module or configuration."""
    return {"dtype": jnp.dtype(module.dtype), "param_dtype": jnp.dtype(module.param_dtype)}


def parameter(
    module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> jax.Array:
    """Declares a parameter in the `param_dtype` of the module or of its configuration.

    It is drawn in float32: random numbers of jax in bfloat16 have 128 values and no mean of zero (jax 0.10.2,
    `findings/jax-normal-in-bfloat16-has-no-tails.sh`).
    """
    zeros = _shapes_alone.get() or not module.is_initializing()  # Flax traces the initializer to compare shapes
    draw = nn.initializers.zeros_init() if zeros else init

    def drawn(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return draw(key, shape, jnp.float32).astype(dtype)

    dtype = jnp.dtype(getattr(module, "config", module).param_dtype)
    return module.param(name, nn.with_logical_partitioning(drawn, axes), shape, dtype)


def add_bias(module: nn.Module, y: jax.Array, axis: str | None) -> jax.Array:
    """Adds `bias[F]` to `y[... F]` if the module has `use_bias`."""
    if not module.use_bias:
        return y
    return y + spread(parameter(module, "bias", nn.initializers.zeros_init(), y.shape[-1:], (axis,)), y)
