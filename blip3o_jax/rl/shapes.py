"""Layout of the rows of a batch for reinforcement learning."""

import functools
import math
from collections.abc import Callable

from jax.sharding import Mesh

from blip3o_jax import sharding
from blip3o_jax.types import FlowRollout, MatchingRollout, TokenRollout

Rollout = TokenRollout | FlowRollout | MatchingRollout
MakeBatch = Callable[..., Rollout]
OF_PAINTING: dict[str, MakeBatch] = {"flow_grpo": FlowRollout, "nft": MatchingRollout, "awm": MatchingRollout}
"""Objective of the diffusion half -> type of its batches."""


def rows_of_prompt(samples: int, rows: int, mesh: Mesh | None, accumulation: int = 1) -> int:
    """Returns how many adjacent rows share a prompt and a device in every micro-batch, and so share its prefill.

    Args:
      samples: samples of a prompt; they are adjacent.
      rows: B, a multiple of `samples`.
      mesh: devices; None for one.
      accumulation: micro-batches, laid out as in `train.step`.
    """
    if samples % accumulation:
        return 1
    devices = 1 if mesh is None else sharding.batch_devices(mesh)
    return math.gcd(samples // accumulation, max(1, rows // (devices * accumulation)))


def batch_maker(objective: str, samples: int, rows: int, mesh: Mesh | None, accumulation: int) -> MakeBatch:
    """Returns the function that builds an update's batch from arrays; arguments as in `rows_of_prompt`."""
    if objective in OF_PAINTING:
        return OF_PAINTING[objective]
    return functools.partial(TokenRollout, prompt_rows=rows_of_prompt(samples, rows, mesh, accumulation))
