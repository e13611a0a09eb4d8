"""AdamW and Muon with per-parameter rules, learning-rate schedules, and the average of the parameters.

Source: decoupled weight decay of Loshchilov & Hutter (2019); cosine schedule with a minimum of transformers'
`get_cosine_with_min_lr_schedule_with_warmup`, as in the released recipes; Muon of Jordan et al. (2024), with updates
scaled to the magnitude of Adam's (Liu et al. 2025), so that learning rate and weight decay apply to both.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from blip3o_jax import treepath
from blip3o_jax.config.schema import Natural, OneOf, Positive, Range, Weight
from blip3o_jax.errors import UserError, require

ADAM_RMS = 0.2  # typical root mean square of Adam's updates before the learning rate (Liu et al. 2025)

Schedule = Callable[[jax.Array | int], jax.Array]
Rate = Annotated[float, Range(0, 1e4)]
Momentum = Annotated[float, Range(0, 1 - 1e-7)]  # below 1 in float32
Pattern = Annotated[str, treepath.Expression()]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer, schedule, clipping, gradient accumulation and parameter average."""

    learning_rate: Annotated[float, Range(1e-12, 1e4)]  # peak
    min_learning_rate: Rate = 0.0  # final value of the cosine schedule
    schedule: Annotated[str, OneOf("cosine", "constant")] = "cosine"  # after warm-up
    warmup_steps: Natural = 0  # linear from 0; a run of no more steps ends below the peak
    b1: Momentum = 0.9
    b2: Momentum = 0.999
    eps: Annotated[float, Range(1e-30, 1)] = 1e-8
    weight_decay: Weight = 0.0  # decoupled, multiplied by the learning rate as in PyTorch
    clip_norm: Positive | None = 1.0  # maximum global norm of the gradients; None: no clipping
    decay_rules: tuple[tuple[Pattern, Weight], ...] = ((r"(bias|scale|scale_shift_table)$", 0.0), ("", 1.0))
    # path -> factor of the weight decay
    learning_rate_rules: tuple[tuple[Pattern, Weight], ...] = (("", 1.0),)  # path -> factor of the learning rate
    muon_rules: tuple[tuple[Pattern, bool], ...] = (("", False),)  # path -> Muon (True, matrices only) or Adam
    muon_momentum: Momentum = 0.95
    accumulation: Annotated[int, Range(1, 2**16)] = 1  # micro-batches per update
    ema_decay: Momentum | None = None  # of the average of the parameters; None: no average
    max_skipped: Natural = 10  # consecutive non-finite updates that are skipped before the run stops

    def __post_init__(self):
        require(
            self.min_learning_rate <= self.learning_rate,
            "optimizer.min_learning_rate",
            self.min_learning_rate,
            f"at most learning_rate {self.learning_rate}",
        )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The gradient transformation, its schedule and the decay of the parameter average."""

    tx: optax.GradientTransformation
    schedule: Schedule  # completed updates -> learning rate f32[]
    ema_decay: float | None


def make_optimizer(config: OptimizerConfig, params: treepath.Tree, num_steps: int) -> Optimizer:
    """Builds the optimizer of `params`.

    Args:
      params: the trainable parameters or their shapes, optionally boxed.
      num_steps: number of updates of the run, the length of the cosine schedule.

    Raises:
      UserError: no rule matches a parameter, or Muon is to update one that is not a matrix.
    """
    schedule = make_schedule(config, num_steps)
    decay = treepath.match(params, config.decay_rules, "optimizer.decay_rules")
    rate = treepath.match(params, config.learning_rate_rules, "optimizer.learning_rate_rules")
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    parts += [
        _scale_by_moments(config, params),
        _add_decay(jax.tree.map(lambda factor: factor * config.weight_decay, decay)),
        _scale_leaves(rate),
        optax.scale_by_learning_rate(schedule),
    ]
    return Optimizer(optax.chain(*parts), schedule, config.ema_decay)


def make_schedule(config: OptimizerConfig, num_steps: int) -> Schedule:
    """Returns linear warm-up from 0 to the peak, then a constant or a cosine to `min_learning_rate` at `num_steps`."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, max(1, num_steps - warmup), config.min_learning_rate / peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def update_average(average: Any, params: Any, decay: float, step: jax.Array) -> Any:
    """Updates the exponential moving average of the parameters, in float32.

    Args:
      decay: upper bound of the decay, which starts as (1 + step) / (10 + step).
      step: i32[], updates before this one.
    """
    step = step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), average, params)


def _scale_by_moments(config: OptimizerConfig, params: treepath.Tree) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    chosen = treepath.match(params, config.muon_rules, "optimizer.muon_rules")
    if not any(treepath.flatten(chosen).values()):
        return adam
    leaves = treepath.flatten(nn.meta.unbox(params))
    for path, muon in treepath.flatten(chosen).items():
        shape = leaves[path].shape
        if muon and len(shape) < 2:
            raise UserError(
                f"optimizer.muon_rules: {path} of shape {shape}",
                expected="a matrix or a stack of matrices",
                do="add a preceding rule that assigns it to Adam",
            )
    labels = jax.tree.map(lambda muon: "muon" if muon else "adam", chosen)
    return optax.partition({"adam": adam, "muon": _scale_by_muon(config.muon_momentum)}, labels)


def _scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """Orthogonalises the momentum of matrices [... in out], scaled to the root mean square of Adam's updates."""
    axes = optax.contrib.MuonDimensionNumbers(-2, -1)
    muon = optax.contrib.scale_by_muon(
        beta=momentum, weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: axes, tree)
    )

    def resize(updates, params):
        del params
        return jax.tree.map(lambda u: u * (ADAM_RMS * max(u.shape[-2:]) ** 0.5), updates)

    return optax.chain(muon, optax.stateless(resize))


def _add_decay(decay: Any) -> optax.GradientTransformation:
    def add(updates, params):
        return jax.tree.map(lambda u, p, d: u + d * p.astype(u.dtype) if d else u, updates, params, decay)

    return optax.stateless(add)


def _scale_leaves(factors: Any) -> optax.GradientTransformation:
    def scale(updates, params):
        del params
        return jax.tree.map(lambda u, factor: factor * u, updates, factors)

    return optax.stateless(scale)
