"""The interface between a stage and the training loop, and the configuration of the loop."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from jax.sharding import Mesh

from blip3o_jax import treepath
from blip3o_jax.config.schema import Count, Natural, OneOf, Range, Seed, Text
from blip3o_jax.train.metrics import Reporter
from blip3o_jax.train.optimizer import OptimizerConfig
from blip3o_jax.train.step import LossFn, Reparametrise, TrainState, identity
from blip3o_jax.types import BatchSource, Params


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """Number of steps, logging, checkpoints and profiling. Periods are in steps."""

    num_steps: Count
    seed: Seed = 0
    log_every: Count = 10  # period of records
    save_every: Count = 1000
    keep: Count = 3  # newest checkpoints that are kept
    keep_best: Natural = 0  # best checkpoints that are kept in addition
    best_metric: Text = "val_loss"
    best_mode: Annotated[str, OneOf("min", "max")] = "min"  # whether the lowest or the highest value is best
    # latest_valid: skip damaged checkpoints; best: train no further, write the model of the best one
    resume: Annotated[str, OneOf("latest", "latest_valid", "best")] = "latest"
    spike_deviations: Annotated[float, Range(0, 1e6)] = 6.0  # standard deviations above the mean that warn of a spike
    tensorboard: bool = True
    wandb_project: Text | None = None
    profile_start: Count | None = None  # first step of a profile in WORKDIR/profile
    profile_steps: Count = 5


@dataclasses.dataclass(frozen=True)
class Hook:
    """A function that is called periodically and after the last step: an evaluation, sample images, an export.

    `run(step, state, reporter)` is called by all processes and returns metrics for the record of the step, or None. It
    must not keep arrays of the state, which the next step donates.
    """

    every: int  # steps
    run: Callable[[int, TrainState, Reporter], dict[str, float] | None]
    reports: str | None = None  # prefix of the names of its metrics; None if best_metric cannot refer to them
    exported: Callable[[int], bool] | None = None  # of the hook that writes the model: whether that of a step is there


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the training loop needs from a stage."""

    loss_fn: LossFn
    optimizer: OptimizerConfig
    abstract_params: Params  # boxed shapes of the trainable parameters
    init_params: Callable[[], Params]  # returns their initial values, which are donated; not called on resumption
    frozen: Params  # all other parameters, on the mesh
    source: BatchSource
    mesh: Mesh | None
    settings: dict[str, Any]  # the resolved configuration
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # further entries of config.json
    hooks: Sequence[Hook] = ()
    flops_per_step: float | None = None  # floating-point operations of one update on all devices
    reparametrise: Reparametrise = identity  # stored parameters -> parameters of the model
    average_to_source: bool = False  # whether the source samples from the averaged parameters

    def whole(self, trainable: Params) -> Params:
        """Returns all parameters of the model."""
        return self.reparametrise(treepath.merge(trainable, self.frozen))
