"""How layers declare parameters with the logical names of their dimensions."""

import contextlib
import contextvars
from collections.abc import Callable

import flax.linen as nn
import jax

from blip3o_jax.nn.kernels import spread

Initializer = Callable[..., jax.Array]
TORCH_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's default for kernels


_shapes_alone = contextvars.ContextVar("shapes_alone", default=False)


@contextlib.contextmanager
def shapes_alone():
    """Within it parameters are zeros: tracing their random numbers takes longer than all else of their shapes."""
    token = _shapes_alone.set(True)
    try:
        yield
    finally:
        _shapes_alone.reset(token)


def parameter(
    module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> jax.Array:
    """Declares a parameter in the module's `param_dtype`."""
    if _shapes_alone.get() or not module.is_initializing():  # Flax traces it to compare shapes
        init = nn.initializers.zeros_init()
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, module.param_dtype)


def add_bias(module: nn.Module, y: jax.Array, axis: str | None) -> jax.Array:
    """`y[... F] + bias[F]` where the module's `use_bias` asks for one."""
    if not module.use_bias:
        return y
    return y + spread(parameter(module, "bias", nn.initializers.zeros_init(), y.shape[-1:], (axis,)), y)
