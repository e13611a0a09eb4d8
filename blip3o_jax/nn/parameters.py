"""How layers declare parameters with the logical names of their dimensions."""

from collections.abc import Callable

import flax.linen as nn
import jax

from blip3o_jax.nn.kernels import spread

Initializer = Callable[..., jax.Array]
TORCH_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's default for kernels


def parameter(
    module: nn.Module, name: str, init: Initializer, shape: tuple[int, ...], axes: tuple[str | None, ...]
) -> jax.Array:
    """Declares a parameter in the module's `param_dtype`."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, module.param_dtype)


def add_bias(module: nn.Module, y: jax.Array, axis: str | None) -> jax.Array:
    """`y[... F] + bias[F]` where the module's `use_bias` asks for one."""
    if not module.use_bias:
        return y
    return y + spread(parameter(module, "bias", nn.initializers.zeros_init(), y.shape[-1:], (axis,)), y)
