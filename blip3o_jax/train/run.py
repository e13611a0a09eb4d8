"""What a stage hands to the training loop, and how long and how often the loop does things."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from blip3o_jax.errors import UserError
from blip3o_jax.train.metrics import Reporter
from blip3o_jax.train.optimizer import OptimizerConfig
from blip3o_jax.train.step import LossFn, TrainState
from blip3o_jax.types import BatchSource, Params


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long, how often, and what is kept."""

    num_steps: int
    seed: int = 0
    log_every: int = 10  # steps per record
    save_every: int = 1000
    keep: int = 3  # newest checkpoints that stay
    keep_best: int = 0  # checkpoints that stay because best_metric was lowest, of those at whose step it was measured
    best_metric: str = "val_loss"
    spike_deviations: float = 6.0  # a loss this far above its running mean is announced
    tensorboard: bool = True
    wandb_project: str | None = None
    profile_start: int | None = None  # step from which a profile is recorded, into WORKDIR/profile
    profile_steps: int = 5

    def __post_init__(self):
        for name in ("num_steps", "log_every", "save_every", "keep", "profile_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"loop.{name}", got=getattr(self, name), expected="1 or more", do="correct it")


@dataclasses.dataclass(frozen=True)
class Hook:
    """Something done every so many steps, and after the last one: an evaluation, sample pictures, an export.

    `run(step, state, reporter)` is called by all processes; it must not keep arrays of the state. What it returns is
    written into the record of that step.
    """

    every: int
    run: Callable[[int, TrainState, Reporter], dict[str, float] | None]
    reports: str | None = None  # what the names of its results begin with; None: it has none, or none to go by


@dataclasses.dataclass(frozen=True)
class Run:
    """What a stage hands to the loop."""

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
