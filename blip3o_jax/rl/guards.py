"""Limits on statistics of rollouts, with an action if they are exceeded: warn, raise the KL weight, or stop.

A rollout is checked before its updates, so the last checkpoint of a stopped run holds an earlier policy.
"""

import dataclasses
import sys
from collections.abc import Collection, Mapping
from typing import Annotated

import numpy as np

from blip3o_jax.config.schema import Count, Natural, OneOf, Range, Share
from blip3o_jax.errors import UserError, require

WATCHED = {  # limit -> (fact, whether the limit is a minimum)
    "max_kl": ("sampled_kl", False),
    "min_entropy": ("sampled_entropy", True),
    "max_gap": ("sampler_gap", False),
    "max_zero_advantage": ("zero_advantage", False),
    "max_duplicates": ("duplicates", False),
}
LARGEST_SCALE = 100.0

Limit = Annotated[float, Range(0, 1e30)]


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Limits, None for no limit, and the action when one is exceeded in `patience` consecutive rollouts."""

    max_kl: Limit | None = None  # divergence from the reference, nats per token
    min_entropy: Limit | None = None  # nats per token
    max_gap: Limit | None = None  # mean |log-prob of the sampler - log-prob of the trainer|
    max_zero_advantage: Share | None = None  # share of samples in groups whose rewards are all equal
    max_duplicates: Share | None = None  # share of samples that repeat an earlier one of their group
    patience: Count = 3
    action: Annotated[str, OneOf("warn", "raise_kl", "stop")] = "warn"
    factor: Annotated[float, Range(1 + 1e-6, 1e6)] = 2.0  # by which raise_kl raises the weight, and lowers it again
    constant_updates: Natural = 8  # stop if the reward has been constant over this many first updates; 0: never


def check_measured(config: GuardConfig, measured: Collection[str]) -> None:
    """Raises UserError for a limit on a fact that is not among the names of those `measured`."""
    for limit, (fact, _) in WATCHED.items():
        bound = getattr(config, limit)
        expected = f"none where {fact} is not measured (by grpo only, with settings.beta > 0 and rescore)"
        require(bound is None or fact in measured, f"rl.guards.{limit}", bound, expected, "leave it out")


class Guards:
    """Counts for how many rollouts each limit has been exceeded, and for how many updates the reward was constant."""

    def __init__(self, config: GuardConfig):
        self._config = config
        self._counts: dict[str, int] = {}
        self._constant: dict[str, float] | None = {}  # label -> the one value so far; None once the reward has varied
        self._updates = 0  # with this value
        self.kl_scale = 1.0  # of the divergence's weight

    def watch(self, rollout: int, facts: Mapping[str, float]) -> None:
        """Checks the means of a rollout against the limits; messages show its number.

        Raises:
          UserError: a limit was exceeded for too long and the action is "stop".
        """
        passed = False
        for limit, (fact, least) in WATCHED.items():
            bound = getattr(self._config, limit)
            if bound is None:
                continue
            beyond = not (facts[fact] >= bound if least else facts[fact] <= bound)  # also NaN
            self._counts[limit] = self._counts.get(limit, 0) + 1 if beyond else 0
            if self._counts[limit] >= self._config.patience:
                passed = True
                self._alarm(rollout, limit, fact, facts[fact], bound)
        if self._config.action == "raise_kl":
            scale = self.kl_scale * self._config.factor if passed else self.kl_scale / self._config.factor
            self.kl_scale = min(max(scale, 1.0), LARGEST_SCALE)

    def _alarm(self, rollout: int, limit: str, fact: str, value: float, bound: float) -> None:
        what = f"rollout {rollout}: {fact} {value:.4g} is beyond rl.guards.{limit} {bound:g}"
        if self._config.action == "stop":
            raise UserError(
                f"{what} for {self._counts[limit]} rollouts in a row",
                expected="a value within",
                do="change the limit and resume, or start another run with a lower learning rate "
                "or a larger settings.beta",
            )
        print(f"warning: {what}", file=sys.stderr)

    def watch_rewards(self, total: np.ndarray, parts: Mapping[str, np.ndarray], updates: int) -> None:
        """Checks that the rewards vary; does nothing once they have.

        Args:
          total: float32[B], the weighted sum that is trained on.
          parts: label -> float32[B] of every reward, NaN where it scores nothing.
          updates: number of updates of this rollout.

        Raises:
          UserError: every reward since the start of the run has had the same value.
        """
        if self._constant is None:
            return
        firsts = {label: values[np.isfinite(values)][:1] for label, values in parts.items()}
        seen = {"": float(total[0]), **{label: float(first[0]) for label, first in firsts.items() if len(first)}}
        if np.ptp(total) or self._constant.get("", seen[""]) != seen[""]:
            self._constant = None
            return
        self._constant, self._updates = seen, self._updates + updates
        if 0 < self._config.constant_updates <= self._updates:
            names = ", ".join(f"{label} {value:g}" for label, value in seen.items() if label)
            raise UserError(
                f"reward {names} for all samples of the first {self._updates} updates",
                expected="one that varies: nothing is learned from a constant",
                do="look at the reward, its options and the images in samples/, or raise rl.guards.constant_updates",
            )

    def state(self) -> dict:
        """Returns the JSON-serialisable state."""
        state = {"counts": dict(self._counts), "kl_scale": self.kl_scale}
        return state | {"constant": self._constant, "constant_updates": self._updates}

    def restore(self, state: dict) -> None:
        """Continues from `state`."""
        self._counts, self.kl_scale = dict(state["counts"]), state["kl_scale"]
        self._constant, self._updates = state.get("constant"), state.get("constant_updates", 0)
