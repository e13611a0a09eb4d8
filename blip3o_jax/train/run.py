"""The interface between a stage and the training loop, and the loop's configuration."""

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
    """How long, how often, and what is kept."""

    num_steps: Count
    seed: Seed = 0
    log_every: Count = 10  # steps per record
    save_every: Count = 1000
    keep: Count = 3  # newest checkpoints that stay
    keep_best: Natural = 0  # checkpoints with the best values of best_metric that stay, whatever their age
    best_metric: Text = "val_loss"
    best_mode: Annotated[str, OneOf("min", "max")] = "min"  # whether low or high values of best_metric are better
    resume: Annotated[str, OneOf("latest", "latest_valid")] = "latest"  # latest_valid: goes back past damaged ones
    spike_deviations: Annotated[float, Range(0, 1e6)] = 6.0  # a loss this far above its running mean is announced
    tensorboard: bool = True
    wandb_project: Text | None = None
    profile_start: Count | None = None  # step from which a profile is recorded, into WORKDIR/profile
    profile_steps: Count = 5


@dataclasses.dataclass(frozen=True)
class Hook:
    """Something done every so many steps, and after the last one: an evaluation, sample images, an export.

    `run(step, state, reporter)` is called by all processes; it must not keep arrays of the state. What it returns is
    written into the record of that step.
    """

    every: int
    run: Callable[[int, TrainState, Reporter], dict[str, float] | None]
    reports: str | None = None  # what the names of its results begin with; None: it has none, or none to go by


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the loop needs from a stage."""

    loss_fn: LossFn
    optimizer: OptimizerConfig
    abstract_params: Params  # annotated shapes of the trainable parameters
    init_params: Callable[[], Params]  # their values, asked for when there is no checkpoint; the loop takes them over
    frozen: Params  # everything else, laid out on the mesh
    source: BatchSource
    mesh: Mesh | None
    settings: dict[str, Any]  # the resolved configuration
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # version and the like, recorded beside it
    hooks: Sequence[Hook] = ()
    flops_per_step: float | None = None  # of one update on all devices together
    reparametrise: Reparametrise = identity  # what the model computes with, of what is stored
    average_to_source: bool = False  # the source is handed the averaged parameters, not those that train

    def whole(self, trainable: Params) -> Params:
        """What the model computes with: trainable and frozen parameters together."""
        return self.reparametrise(treepath.merge(trainable, self.frozen))
