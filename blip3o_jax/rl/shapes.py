"""Layout of the batches of reinforcement learning."""

import dataclasses
import math
from typing import Any

from jax.sharding import Mesh

from blip3o_jax import sharding
from blip3o_jax.types import FlowRollout, GrpoNftRollout, MatchingRollout, TokenRollout

Rollout = TokenRollout | FlowRollout | MatchingRollout
ROLLOUTS: dict[str, type[Rollout]] = {
    "grpo": TokenRollout,
    "flow_grpo": FlowRollout,
    "nft": MatchingRollout,
    "awm": MatchingRollout,
    "grpo_nft": GrpoNftRollout,
}
"""Objective -> type of its batches."""


def rows_of_prompt(samples: int, rows: int, mesh: Mesh | None, accumulation: int = 1) -> int:
    """Returns how many adjacent rows share a prompt and a device in every micro-batch, and so share its prefill.

    There are B = `rows` rows, in groups of `samples` adjacent ones of a prompt, and `accumulation` micro-batches, laid
    out as in `train.step`.
    """
    if samples % accumulation:
        return 1
    return math.gcd(samples // accumulation, max(1, rows // (_devices(mesh) * accumulation)))


@dataclasses.dataclass(frozen=True)
class UpdateLayout:
    """Layout of the rows of updates.

    Attributes:
      objective: a key of ROLLOUTS.
      samples: samples of a prompt; they are adjacent and stay together.
      rows: B, the samples of an update.
      mesh: devices; None for one.
      accumulation: micro-batches of an update.
      parts: rows that have no effect may be left out in steps of 1 / `parts` of B.
    """

    objective: str
    samples: int
    rows: int
    mesh: Mesh | None = None
    accumulation: int = 1
    parts: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of rows that an update may have, rising to B: whole groups, equally many on every device."""
        unit = math.lcm(self.samples, _devices(self.mesh) * self.accumulation)
        sizes = {self.rows * part // self.parts for part in range(1, self.parts)} - {0}
        return (*sorted(size for size in sizes if size % unit == 0), self.rows)

    def holds(self, arrays: dict[str, Any], rows: int) -> bool:
        """Returns whether field -> array are complete arrays of `rows` rows, as this version makes them."""
        fields = dataclasses.fields(ROLLOUTS[self.objective])
        needed = {field.name for field in fields if field.default is dataclasses.MISSING}
        complete = needed <= arrays.keys() <= {field.name for field in fields}
        single = (arrays[name].shape == (rows,) for name in ("mask", "advantage", "kl_scale"))
        return complete and all(single) and all(len(array) == rows for array in arrays.values())

    def batch(self, rows: int, arrays: dict[str, Any]) -> Rollout:
        """Builds the batch of an update of `rows` rows, one of `sizes`.

        `arrays` are field -> array, of all its rows or of this process's part of them.
        """
        kind = ROLLOUTS[self.objective]
        if not issubclass(kind, TokenRollout):
            return kind(**arrays)
        together = rows_of_prompt(self.samples, rows, self.mesh, self.accumulation)
        return kind(**arrays, prompt_rows=together, mean_rows=self.rows // self.accumulation)


def _devices(mesh: Mesh | None) -> int:
    return 1 if mesh is None else sharding.batch_devices(mesh)
