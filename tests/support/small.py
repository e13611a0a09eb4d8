"""What the tests of image objectives share: cheap parameters, cheap programs, a few training steps."""

import functools

import flax.linen as nn
import jax
import numpy as np

from blip3o_jax import treepath
from blip3o_jax.train.optimizer import OptimizerConfig, make_optimizer
from blip3o_jax.train.step import create_state, make_train_step
from blip3o_jax.types import Batch

# a tenth of a second of running time is not worth half a minute of optimisation
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def params_of(make, seed: int = 0):
    """Parameters of the shapes that `make(key)` gives, without compiling the initialisers."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        kind = path.rsplit("/", 1)[-1]
        if kind in ("bias", "scale"):
            return np.full(leaf.shape, kind == "scale", np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 3 else leaf.shape[-2]
        return (rng.normal(size=leaf.shape) / np.sqrt(1 if kind == "table" else 2 * fan_in)).astype(np.float32)

    return treepath.map_with_path(fill, nn.meta.unbox(jax.eval_shape(make, jax.random.key(0))))


def image_batch(**fields: np.ndarray) -> Batch:
    """Rows of pictures without text, as the data layer makes them."""
    rows = len(next(iter(fields.values())))
    ids, number, flags = np.zeros((rows, 0), np.int32), np.zeros(rows, np.int32), np.zeros((rows, 0), bool)
    return Batch(ids, number, flags, ids, number, flags, **fields)


@functools.cache
def program(loss, accumulation: int):
    """The optimizer's maker and the compiled step of a loss."""
    config = OptimizerConfig(3e-3, schedule="constant", accumulation=accumulation)

    def step(state, frozen, batch):
        return make_train_step(loss, make_optimizer(config, state.params, 100), 0, accumulation)(state, frozen, batch)

    return lambda params: make_optimizer(config, params, 100), jit(step)


def train(loss, params, batch, num_steps: int, frozen=None, accumulation: int = 1):
    """Metrics of every step, averaged (None without weight), and the trained parameters."""
    make, step = program(loss, accumulation)
    state, history = create_state(params, make(params)), []
    for _ in range(num_steps):
        state, metrics = step(state, frozen or {}, batch)
        sums = jax.device_get(metrics)
        history.append({name: total / weight if weight else None for name, (total, weight) in sums.items()})
    return history, state.params
