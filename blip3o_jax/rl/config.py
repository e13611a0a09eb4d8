"""Configuration of rollouts: the `rl` section of an experiment."""

import dataclasses

from blip3o_jax.data.config import DataConfig
from blip3o_jax.diffusion import samplers
from blip3o_jax.errors import UserError
from blip3o_jax.generate.paint import SamplerName, Steps
from blip3o_jax.rl.advantages import ADVANTAGES
from blip3o_jax.rl.guards import GuardConfig
from blip3o_jax.rl.judge import RewardConfig


@dataclasses.dataclass(frozen=True)
class RenderConfig:
    """How sampled tokens become the pictures that are judged."""

    num_inference_steps: Steps = 30
    guidance_scale: float = 2.0
    sampler: SamplerName = "euler"
    shared_noise: bool = True  # one initial noise for all samples of a prompt: they differ by their tokens alone

    def __post_init__(self):
        samplers.find(self.sampler)


@dataclasses.dataclass(frozen=True)
class HeldOutConfig:
    """Prompts that are never trained on, judged on the way."""

    data: DataConfig  # its batch_size: pictures at a time
    rewards: tuple[RewardConfig, ...]  # may be others than those that are trained for
    count: int = 64  # prompts
    every: int = 50  # steps
    use_ema: bool = False  # judge the averaged parameters
    max_drop: float | None = None  # the run stops where a reward falls this far below its best so far; None: never

    def __post_init__(self):
        for name in ("count", "every"):
            if getattr(self, name) < 1:
                raise UserError(f"rl.held_out.{name}", got=getattr(self, name), expected="1 or more", do="raise it")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """What is sampled for how many updates. `data.batch_size` is the number of samples behind one update."""

    rewards: tuple[RewardConfig, ...]
    group_size: int = 16  # samples of one prompt
    minibatches: int = 1  # updates that share the samples of a rollout: it has minibatches * data.batch_size samples
    epochs: int = 1  # passes over them
    advantages: str = "grpo"  # grpo | grpo_global | rloo | dr_grpo
    clip_advantage: float | None = None  # advantages beyond it are cut
    sample_batch_size: int | None = None  # pictures that are sampled and rendered at a time; default: all
    render: RenderConfig = RenderConfig()
    guards: GuardConfig = GuardConfig()
    held_out: HeldOutConfig | None = None
    groups_every: int = 0  # steps between sheets of the best and worst of some groups and of curves; 0: none

    def __post_init__(self):
        if self.advantages not in ADVANTAGES:
            raise UserError(
                "rl.advantages", got=f"{self.advantages!r}", expected=f"one of {', '.join(ADVANTAGES)}", do="choose one"
            )
        for name, low in (("group_size", 2), ("minibatches", 1), ("epochs", 1), ("groups_every", 0)):
            if getattr(self, name) < low:
                raise UserError(f"rl.{name}", got=getattr(self, name), expected=f"{low} or more", do="raise it")
        if self.clip_advantage is not None and not self.clip_advantage > 0:
            raise UserError("rl.clip_advantage", got=self.clip_advantage, expected="more than 0", do="leave it out")

    @property
    def updates(self) -> int:
        """Updates per rollout."""
        return self.minibatches * self.epochs

    def check(self, batch_size: int) -> None:
        """Raises UserError where groups do not fit into batches.

        Args:
          batch_size: samples behind one update.
        """
        if batch_size % self.group_size:
            raise UserError(
                "rl.group_size",
                got=f"{self.group_size} for data.batch_size {batch_size}",
                expected="a divisor of it",
                do="change one of them",
            )
        total, part = batch_size * self.minibatches, self.sample_batch_size
        if part is not None and (part < 1 or part % self.group_size or total % part):
            raise UserError(
                "rl.sample_batch_size",
                got=part,
                expected=f"a multiple of group_size {self.group_size} that divides the {total} samples of a rollout",
                do="change it",
            )
