"""Configuration of rollouts: the `rl` section of an experiment."""

import dataclasses
from typing import Annotated

from blip3o_jax.config.model import Guidance
from blip3o_jax.config.schema import Count, Natural, OneOf, Positive, Range
from blip3o_jax.data.config import DataConfig
from blip3o_jax.diffusion import samplers
from blip3o_jax.errors import UserError
from blip3o_jax.generate.paint import SamplerName, Steps
from blip3o_jax.generate.window import Decoding, Method, Window
from blip3o_jax.rl.advantages import ADVANTAGES
from blip3o_jax.rl.guards import GuardConfig
from blip3o_jax.rl.judge import RewardConfig


@dataclasses.dataclass(frozen=True)
class RenderConfig:
    """How sampled tokens become the images that are judged."""

    num_inference_steps: Steps = 30
    guidance_scale: Guidance = 2.0
    sampler: SamplerName = "euler"
    shared_noise: bool = True  # one initial noise for all samples of a prompt: they differ by their tokens alone

    def __post_init__(self):
        samplers.find(self.sampler)


@dataclasses.dataclass(frozen=True)
class HeldOutConfig:
    """Prompts that are never trained on, judged on the way."""

    data: DataConfig  # its batch_size: images at a time
    rewards: tuple[RewardConfig, ...]  # may be others than those that are trained for
    count: Annotated[int, Range(1, 1_000_000)] = 64  # prompts
    every: Count = 50  # steps
    use_ema: bool = False  # judge the averaged parameters
    max_drop: Annotated[float, Range(0, 1e30)] | None = None  # below its best so far, at which the run stops


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """What is sampled for how many updates. `data.batch_size` is the number of samples behind one update."""

    rewards: tuple[RewardConfig, ...]
    group_size: Annotated[int, Range(2, 65_536)] = 16  # samples of one prompt
    minibatches: Annotated[int, Range(1, 65_536)] = 1  # updates that share a rollout of so many times batch_size
    epochs: Annotated[int, Range(1, 65_536)] = 1  # passes over them
    advantages: Annotated[str, OneOf(*ADVANTAGES)] = "grpo"
    clip_advantage: Positive | None = None  # advantages beyond it are cut
    sample_batch_size: Count | None = None  # images that are sampled and rendered at a time; default: all
    sample_average: bool = False  # the averaged parameters sample, not those that train
    render: RenderConfig = RenderConfig()
    guards: GuardConfig = GuardConfig()
    held_out: HeldOutConfig | None = None
    token_decoding: Method = "auto"  # the same tokens at another speed
    token_window: Window | None = None
    groups_every: Natural = 0  # steps between sheets of the best and worst of some groups and of curves; 0: none

    @property
    def updates(self) -> int:
        """Updates per rollout."""
        return self.minibatches * self.epochs

    @property
    def decoding(self) -> Decoding:
        """How many tokens are decoded at a time."""
        return Decoding(self.token_decoding, self.token_window)

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
        if part is not None and (part % self.group_size or total % part):
            raise UserError(
                "rl.sample_batch_size",
                got=part,
                expected=f"a multiple of group_size {self.group_size} that divides the {total} samples of a rollout",
                do="change it",
            )
