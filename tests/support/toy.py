"""A small regression objective, its data and its run: what the generic training core is tested with."""

import dataclasses
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax import masked, sharding, treepath
from blip3o_jax.nn.linear import Linear
from blip3o_jax.train.optimizer import OptimizerConfig
from blip3o_jax.train.run import LoopConfig, Run
from blip3o_jax.train.step import LossTerm

WIDTH = 16


class Net(nn.Module):
    """Two layers and a frozen one in front."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Linear(WIDTH, ("embed", "mlp"), name="frozen_in")(x)
        x = jnp.tanh(Linear(4 * WIDTH, ("embed", "mlp"), name="hidden")(x))
        return Linear(WIDTH, ("mlp", "embed"), name="out")(x)


TRAINABLE = (("^frozen", False), ("", True))


def init(key: jax.Array):
    """Annotated parameters."""
    return Net().init(key, jnp.zeros((1, WIDTH)))["params"]


def loss_fn(params, batch, keys):
    """Two terms with weights of their own, uneven from row to row, and noise drawn row by row."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (WIDTH,)))(keys)
    y = Net().apply({"params": params}, batch["x"] + 0.1 * noise)
    squared = masked.metric((y - batch["y"]) ** 2, batch["mask"])
    size = masked.metric(jnp.abs(y).mean(-1), batch["kind"])
    terms = {"square": LossTerm(*squared), "size": LossTerm(*size, 0.1)}
    count = jnp.float32(batch["x"].shape[0])
    return terms, {"images": (count, count), "bias": masked.metric(y - batch["y"], batch["mask"])}


@dataclasses.dataclass
class Source:
    """Batches that follow from their number; supervised, so parameters are ignored. Every process takes its share."""

    rows: int = 16
    position: int = 0
    delay: float = 0.0
    broken: tuple[int, ...] = ()  # batches with infinite inputs

    def next(self, params, key):
        del params, key
        time.sleep(self.delay)
        rng = np.random.default_rng(self.position)
        scale = np.float32(np.inf if self.position in self.broken else 1)
        self.position += 1
        x = rng.normal(size=(self.rows, WIDTH)).astype(np.float32)
        mask = rng.random((self.rows, WIDTH)) < rng.random((self.rows, 1))
        batch = {"x": x * scale, "y": np.roll(x, 1, 1), "mask": mask, "kind": rng.random(self.rows) < 0.3}
        share = self.rows // jax.process_count()
        start = jax.process_index() * share
        return {name: leaf[start : start + share] for name, leaf in batch.items()}

    def state(self):
        return {"position": self.position}

    def restore(self, state):
        self.position = state["position"]

    def close(self):
        self.closed = True


def loop_config(**changes):
    """A short run that logs every step."""
    values = {"num_steps": 12, "log_every": 1, "save_every": 4, "keep": 2, "tensorboard": False}
    return LoopConfig(**{**values, **changes})


def make_run(mesh=None, source=None, loss=loss_fn, optimizer=None, width=WIDTH, **fields):
    """The run of the toy objective; `width` only makes the checkpoint larger."""

    def parts(key):
        params = treepath.partition(init(key), TRAINABLE)
        extra = nn.LogicallyPartitioned(jax.random.normal(key, (width, width)), ("embed", "mlp"))
        return {**params[0], "ballast": extra} if width > WIDTH else params[0], params[1]

    trainable, frozen = jax.eval_shape(parts, jax.random.key(0))
    shardings = None if mesh is None else sharding.shardings_of((trainable, frozen), mesh)
    values = jax.jit(lambda key: nn.meta.unbox(parts(key)), out_shardings=shardings)(jax.random.key(0))
    config = {"learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.1, "ema_decay": 0.9, **(optimizer or {})}
    return Run(
        loss_fn=loss,
        optimizer=OptimizerConfig(**config),
        abstract_params=trainable,
        init_params=lambda: values[0],
        frozen=values[1],
        source=source or Source(),
        mesh=mesh,
        settings={"optimizer": config},
        **fields,
    )
