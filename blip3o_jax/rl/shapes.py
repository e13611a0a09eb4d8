"""How the rows of a batch of reinforcement learning lie together."""

import functools
import math
from collections.abc import Callable

from jax.sharding import Mesh

from blip3o_jax import sharding
from blip3o_jax.types import FlowRollout, MatchingRollout, TokenRollout

Rollout = TokenRollout | FlowRollout | MatchingRollout
MakeBatch = Callable[..., Rollout]
OF_PAINTING: dict[str, MakeBatch] = {"flow_grpo": FlowRollout, "nft": MatchingRollout, "awm": MatchingRollout}
"""Objective of the diffusion half -> what it learns from."""


def rows_of_prompt(samples: int, rows: int, mesh: Mesh | None, accumulation: int = 1) -> int:
    """How many rows in a row have one prompt and lie on one device, in every micro-batch: they share its reading.

    Args:
      samples: of a prompt, which follow each other.
      rows: B, a multiple of `samples`.
      mesh: devices; None for one.
      accumulation: micro-batches, laid out as `train.step` does it.
    """
    if samples % accumulation:
        return 1
    devices = 1 if mesh is None else sharding.batch_devices(mesh)
    return math.gcd(samples // accumulation, max(1, rows // (devices * accumulation)))


def batch_maker(objective: str, samples: int, rows: int, mesh: Mesh | None, accumulation: int) -> MakeBatch:
    """What makes an update's batch of its arrays; arguments as in `rows_of_prompt`."""
    if objective in OF_PAINTING:
        return OF_PAINTING[objective]
    return functools.partial(TokenRollout, prompt_rows=rows_of_prompt(samples, rows, mesh, accumulation))
