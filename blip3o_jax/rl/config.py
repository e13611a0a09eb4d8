"""Configuration of rollouts: the `rl` section of an experiment."""

import dataclasses
from typing import Annotated

from blip3o_jax.config.model import Guidance
from blip3o_jax.config.schema import Count, Natural, OneOf, Positive, Range
from blip3o_jax.data.config import DataConfig
from blip3o_jax.diffusion import samplers
from blip3o_jax.errors import require
from blip3o_jax.generate.paint import SamplerName, Steps
from blip3o_jax.generate.window import Decoding, Method, Window
from blip3o_jax.rl.advantages import ADVANTAGES
from blip3o_jax.rl.guards import GuardConfig
from blip3o_jax.rl.judge import RewardConfig


@dataclasses.dataclass(frozen=True)
class RenderConfig:
    """How sampled tokens are rendered to the images that are scored."""

    num_inference_steps: Steps = 30
    guidance_scale: Guidance = 2.0
    sampler: SamplerName = "euler"
    shared_noise: bool = True  # with grpo, the samples of a prompt share their initial noise

    def __post_init__(self):
        samplers.find(self.sampler)


@dataclasses.dataclass(frozen=True)
class HeldOutConfig:
    """Prompts that are not trained on, scored during the run; broken ones are left out."""

    data: DataConfig  # batch_size: images sampled at a time
    rewards: tuple[RewardConfig, ...]  # may differ from the training rewards
    count: Annotated[int, Range(1, 1_000_000)] = 64  # prompts
    every: Count = 50  # steps
    use_ema: bool = False  # score the averaged parameters
    max_drop: Annotated[float, Range(0, 1e30)] | None = None  # stop when a score falls this far below its best


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How rollouts are sampled and used. `data.batch_size` is the number of samples per update."""

    rewards: tuple[RewardConfig, ...]
    group_size: Annotated[int, Range(2, 65_536)] = 16  # samples of one prompt
    minibatches: Annotated[int, Range(1, 65_536)] = 1  # updates per epoch; a rollout has this many batches of samples
    epochs: Annotated[int, Range(1, 65_536)] = 1  # passes over a rollout
    advantages: Annotated[str, OneOf(*ADVANTAGES)] = "grpo"
    clip_advantage: Positive | None = None  # clip advantages to [-x, x]
    update_parts: Annotated[int, Range(1, 64)] = 4  # updates leave out groups with equal rewards, which have no effect,
    # in steps of 1 / update_parts of their rows; every number of rows is compiled once. 1: leave out none
    sample_batch_size: Count | None = None  # images sampled and rendered at a time; default: all
    sample_average: bool = False  # sample from the averaged parameters
    render: RenderConfig = RenderConfig()
    guards: GuardConfig = GuardConfig()
    held_out: HeldOutConfig | None = None
    token_decoding: Method = "auto"  # changes the speed, not the tokens
    token_window: Window | None = None
    groups_every: Natural = 0  # steps between sheets of the best and worst samples and of curves; 0: none

    @property
    def updates(self) -> int:
        """Number of updates per rollout."""
        return self.minibatches * self.epochs

    @property
    def decoding(self) -> Decoding:
        """How image tokens are decoded."""
        return Decoding(self.token_decoding, self.token_window)

    def check(self, batch_size: int) -> None:
        """Raises UserError if groups do not fit into updates of `batch_size` samples."""
        got = f"{self.group_size} for data.batch_size {batch_size}"
        require(batch_size % self.group_size == 0, "rl.group_size", got, "a divisor of it", "change one of them")
        total = batch_size * self.minibatches
        part = self.sample_batch_size or total
        expected = f"a multiple of group_size {self.group_size} that divides the {total} samples of a rollout"
        require(part % self.group_size == 0 and total % part == 0, "rl.sample_batch_size", part, expected)
