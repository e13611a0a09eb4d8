"""Builds rollouts and their hooks for an objective."""

from typing import Any

from jax.sharding import Mesh

from blip3o_jax import sharding
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.data.config import DataConfig
from blip3o_jax.errors import require
from blip3o_jax.rl.config import RolloutConfig
from blip3o_jax.rl.guards import check_measured
from blip3o_jax.rl.hooks import groups_hook, held_out_hook
from blip3o_jax.rl.judge import Judge
from blip3o_jax.rl.prompt_stream import PromptStream
from blip3o_jax.rl.rollout import RolloutSource
from blip3o_jax.rl.samplers import FlowSampler, GrpoNftSampler, MatchingSampler, Sampler, TokenSampler
from blip3o_jax.rl.shapes import UpdateLayout
from blip3o_jax.text.tokenizer import Tokenizer
from blip3o_jax.train.run import Hook
from blip3o_jax.types import Params

SAMPLERS: dict[str, type[Sampler]] = {
    "grpo": TokenSampler,
    "flow_grpo": FlowSampler,
    "nft": MatchingSampler,
    "awm": MatchingSampler,
    "grpo_nft": GrpoNftSampler,
}
"""Objective that learns from rollouts -> class of its sampler."""


def make_sampler(
    objective: str,
    settings: Any,
    config: RolloutConfig,
    model: Blip3oConfig,
    tokenizer: Tokenizer,
    row_length: int,
    max_references: int,
    mesh: Mesh | None,
) -> Sampler:
    """Builds the sampler of an objective, a key of SAMPLERS, from its settings and the section `rl`.

    Args:
      row_length: positions of a prompt and of the tokens sampled for it.
      max_references: references of a prompt at most.

    Raises:
      UserError: a row has no room for a prompt, or the guards raise the weight of a KL term that the loss lacks.
    """
    adjustable = settings.beta > 0 or config.guards.action != "raise_kl"
    require(adjustable, "rl.guards.action", "raise_kl", "warn or stop where settings.beta is 0")
    length = row_length - model.num_image_tokens
    expected = f"more than the {model.num_image_tokens} tokens of an image, for the prompt"
    require(length >= 1, "row.length", row_length, expected, "raise it")
    config.decoding.check(model.num_image_tokens)
    return SAMPLERS[objective](model, tokenizer, settings, config.render, length, max_references, mesh, config.decoding)


def make_source(
    objective: str, config: RolloutConfig, data: DataConfig, sampler: Sampler, seed: int, accumulation: int
) -> RolloutSource:
    """Builds the source of an objective's batches; `data` are prompts, and `accumulation` the micro-batches per update.

    Raises:
      UserError: the settings do not fit together.
    """
    check_measured(config.guards, sampler.measured)
    layout = UpdateLayout(
        objective, config.group_size, data.batch_size, sampler.mesh, accumulation, config.update_parts
    )
    prompts, judge, reader = PromptStream(data, sampler.check), Judge(config.rewards), sharding.reader(sampler.mesh)
    return RolloutSource(config, layout, prompts, judge, sampler, seed, reader)


def make_hooks(
    config: RolloutConfig, source: RolloutSource, sampler: Sampler, frozen: Params, workdir: str, seed: int
) -> list[Hook]:
    """Builds the hooks that the section `rl` asks for; `frozen` are the parameters that do not train."""
    hooks = []
    if config.held_out is not None:
        hooks.append(held_out_hook(config.held_out, sampler, frozen, seed + 1, workdir))
    if config.groups_every:
        hooks.append(groups_hook(source, config.groups_every, config.group_size, workdir))
    return hooks


def is_reward(name: str) -> bool:
    """Returns whether a logged name is the training reward, or a held-out reward over all prompts."""
    return name == "reward" or (name.startswith("held_out/") and name.count("/") == 1)
