"""The training state and the training step of all objectives.

B rows of a batch, A micro-batches per update.

An objective is a function `loss(params, batch, keys) -> (terms, metrics)`. Its parameters are the trainable and frozen
parameters, merged and passed through `reparametrise`. The loss is the sum over terms of `coefficient * sum / weight`,
where sums and weights run over all rows of the global batch: gradient accumulation gives the gradients of the whole
batch even if micro-batches have different numbers of tokens. `keys` is one random key per row that depends only on the
seed, the step and the row, so results depend neither on the number of devices nor on A. A `Scheduled` loss may also
depend on the step, and on a random key that all rows share.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from blip3o_jax import masked, sharding, treepath
from blip3o_jax.errors import require, type_of
from blip3o_jax.train.optimizer import Optimizer, update_average
from blip3o_jax.types import Array, Metrics, Params


class LossTerm(NamedTuple):
    """One term of the loss: `coefficient * sum / weight`, or 0 if the weight is 0."""

    sum: jax.Array  # f32[], over the rows of the (micro-)batch
    weight: jax.Array  # f32[], number of tokens or images in `sum`; must not depend on the parameters
    coefficient: float = 1.0


LossFn = Callable[[Params, Any, jax.Array], tuple[dict[str, LossTerm], Metrics]]
Reparametrise = Callable[[Params], Params]


def identity(params: Params) -> Params:
    """Returns the parameters unchanged."""
    return params


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """A loss that depends on the training step; called directly, it is the loss for evaluation."""

    at: Callable[[jax.Array, jax.Array], LossFn]  # (completed steps i32[], key) -> loss of all micro-batches
    held_out: LossFn

    def __call__(self, params: Params, batch: Any, keys: jax.Array) -> tuple[dict[str, LossTerm], Metrics]:
        return self.held_out(params, batch, keys)


@flax.struct.dataclass
class TrainState:
    """Everything that a step updates."""

    step: Array  # i32[], completed steps
    params: Params  # trainable parameters only
    opt_state: Any
    ema: Params | None  # exponential moving average of `params`, in float32
    skipped: Array  # i32[], steps without an update because loss or gradients were not finite
    skipped_in_a_row: Array  # i32[], the latest of them without a finite step in between


def create_state(params: Params, optimizer: Optimizer) -> TrainState:
    """Returns the initial state; boxed `params` give boxed moments and averages."""
    floats = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.tx.init(floats),
        ema=None if optimizer.ema_decay is None else jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), floats),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
    )


def abstract_state(params: Params, optimizer: Optimizer, mesh: Mesh | None) -> TrainState:
    """Returns the shapes and shardings of the state; moments and averages are sharded as their parameters are.

    Args:
      params: boxed shapes of the trainable parameters, as `jax.eval_shape(module.init, ...)` returns them.
      mesh: None for a single device.
    """
    return sharding.sharded_shapes(jax.eval_shape(lambda tree: create_state(tree, optimizer), params), mesh)


def init_state(params: Params, optimizer: Optimizer, layout: TrainState, mesh: Mesh | None) -> TrainState:
    """Returns the initial state, sharded as `layout`; donates `params`."""
    if mesh is None:
        return jax.jit(create_state, static_argnums=1, donate_argnums=0)(params, optimizer)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)
    params = jax.device_put(params, shardings.params)
    return jax.jit(create_state, static_argnums=1, donate_argnums=0, out_shardings=shardings)(params, optimizer)


def step_key(seed: int, step: jax.Array | int, purpose: str) -> jax.Array:
    """Returns the random key of a step for "loss" (per row), "source" (rollouts) or "schedule" (shared by all rows)."""
    purposes = ("loss", "source", "schedule")
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), purposes.index(purpose))


def make_train_step(
    loss_fn: LossFn,
    optimizer: Optimizer,
    seed: int,
    accumulation: int = 1,
    reparametrise: Reparametrise = identity,
) -> Callable:
    """Returns the training step `(state, frozen, batch) -> (state, metrics)`, to be compiled by `compile_step`.

    Args:
      accumulation: A, a divisor of B.
      reparametrise: merged parameters -> parameters of the loss; differentiated.
    """

    def train_step(state: TrainState, frozen: Params, batch: Any) -> tuple[TrainState, Metrics]:
        key, objective = step_key(seed, state.step, "loss"), loss_fn
        if isinstance(loss_fn, Scheduled):
            objective = loss_fn.at(state.step, step_key(seed, state.step, "schedule"))

        def loss_of(params: Params, batch: Any, keys: jax.Array) -> tuple[dict[str, LossTerm], Metrics]:
            return _checked(objective(reparametrise(treepath.merge(params, frozen)), batch, keys))

        loss, terms, metrics, grads = _loss_and_gradients(loss_of, accumulation, state.params, batch, key)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updated = _apply(state, grads, optimizer)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
        new = kept.replace(
            step=state.step + 1,
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        one = jnp.float32(1)
        report = {"loss": (loss, one), **_term_metrics(terms)}
        report |= {"grad_norm": (norm, one), "lr": (optimizer.schedule(state.step - state.skipped), one)}
        return new, report | metrics | {"skipped_in_a_row": (new.skipped_in_a_row.astype(jnp.float32), one)}

    return train_step


def compile_step(step: Callable, layout: TrainState, mesh: Mesh | None) -> Callable:
    """Jits a training step: donates the state, keeps its sharding, and replicates metrics."""
    if mesh is None:
        return jax.jit(step, donate_argnums=0)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())))


def make_evaluation(loss_fn: LossFn, seed: int, reparametrise: Reparametrise = identity) -> Callable:
    """Returns `(params, frozen, batch, index) -> (metrics, coefficients)` for the held-out batch number `index`.

    Coefficients are those of the loss terms, by the name of their metric.
    """

    def evaluate(params: Params, frozen: Params, batch: Any, index: jax.Array) -> tuple[Metrics, dict[str, Any]]:
        whole = reparametrise(treepath.merge(params, frozen))
        terms, metrics = _checked(loss_fn(whole, batch, _row_keys(step_key(seed, index, "loss"), batch)))
        return _term_metrics(terms) | dict(metrics), {f"loss_{name}": term.coefficient for name, term in terms.items()}

    return evaluate


def _checked(result: Any) -> tuple[dict[str, LossTerm], Metrics]:
    """Returns the result of a loss function; raises UserError if it is not one."""

    def numbers(values: tuple) -> bool:
        return all(isinstance(x, int | float | np.number | Array) and jnp.ndim(x) == 0 for x in values)

    good = isinstance(result, tuple) and len(result) == 2 and all(isinstance(part, Mapping) for part in result)
    expected, do = "a tuple of 2 dictionaries: terms and metrics", "correct the objective"
    require(good, "loss function", type_of(result), expected, do)
    terms, metrics = result
    require(len(terms) > 0, "loss function: terms", "none", "one LossTerm at least", do)
    for name, term in terms.items():
        good, got = isinstance(term, LossTerm) and numbers(term), _shown(term)
        require(good, f"loss function: term {name}", got, "a LossTerm of scalars", do)
    for name, pair in metrics.items():
        good, got = isinstance(pair, tuple) and len(pair) == 2 and numbers(pair), _shown(pair)
        require(good, f"loss function: metric {name}", got, "a tuple of 2 scalars: weighted sum and weight", do)
    return terms, metrics


def _shown(value: Any) -> str:
    return f"({', '.join(map(type_of, value))})" if isinstance(value, tuple) else type_of(value)


def _row_keys(key: jax.Array, batch: Any) -> jax.Array:
    """Returns one key per row; raises UserError if the leaves of the batch have no common leading dimension."""
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(batch)}
    equal = len(sizes) == 1 and None not in sizes
    require(equal, "batch", f"leading dimensions {sizes}", "one number of rows", "check the data source")
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(sizes.pop()))


def _total(terms: dict[str, LossTerm], weights: dict[str, jax.Array]) -> jax.Array:
    parts = [term.coefficient * masked.ratio(term.sum, weights[name]) for name, term in terms.items()]
    return jnp.asarray(sum(parts), jnp.float32)


def _term_metrics(terms: dict[str, LossTerm]) -> dict[str, tuple[jax.Array, jax.Array]]:
    return {f"loss_{name}": (term.sum, term.weight) for name, term in terms.items()}


def _weights(terms: dict[str, LossTerm]) -> dict[str, jax.Array]:
    return {name: jax.lax.stop_gradient(term.weight) for name, term in terms.items()}


def _loss_and_gradients(loss_fn, accumulation, params, batch, key):
    """Returns loss f32[], terms, metrics and float32 gradients of a batch; equal for every `accumulation`."""

    def loss(params, weights, batch, keys):
        terms, metrics = loss_fn(params, batch, keys)
        return _total(terms, _weights(terms) if weights is None else weights), (terms, dict(metrics))

    gradient = jax.grad(loss, has_aux=True)
    keys = _row_keys(key, batch)
    if accumulation == 1:
        grads, (terms, metrics) = gradient(params, None, batch, keys)
        grads = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)
    else:
        parts = jax.tree.map(lambda leaf: _micro_batches(leaf, accumulation), (batch, keys))
        # Only the weights are used here: XLA removes the computation of the sums.
        weights = jax.lax.map(lambda part: _weights(loss_fn(params, *part)[0]), parts)
        weights = jax.tree.map(lambda leaf: leaf.sum(0), weights)

        def accumulate(grads, part):
            new, aux = gradient(params, weights, *part)
            return jax.tree.map(jnp.add, grads, new), aux

        zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), params)
        grads, (terms, metrics) = jax.lax.scan(accumulate, zeros, parts)
        terms = {name: LossTerm(t.sum.sum(0), t.weight.sum(0), t.coefficient[0]) for name, t in terms.items()}
        metrics = jax.tree.map(lambda leaf: leaf.sum(0), metrics)
    return _total(terms, _weights(terms)), terms, metrics, grads


def _micro_batches(leaf: jax.Array, accumulation: int) -> jax.Array:
    """[B ...] -> [A B/A ...], see `sharding.split_rows`."""
    got = f"{accumulation} for {len(leaf)} rows"
    require(len(leaf) % accumulation == 0, "optimizer.accumulation", got, "a divisor", "change one of them")
    return sharding.split_rows(leaf, accumulation)


def _apply(state: TrainState, grads: Params, optimizer: Optimizer) -> TrainState:
    updates, opt_state = optimizer.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = update_average(ema, params, optimizer.ema_decay, state.step - state.skipped)
    return dataclasses.replace(state, params=params, opt_state=opt_state, ema=ema)
