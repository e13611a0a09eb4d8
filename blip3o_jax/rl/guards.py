"""Watches a policy while it learns, and acts: warn, raise the weight of the divergence, or stop.

What is watched is measured on every rollout, before its updates: so a run is stopped while its last checkpoint is
still the one of a healthy policy.
"""

import dataclasses
import sys
from collections.abc import Collection, Mapping

from blip3o_jax.errors import UserError

ACTIONS = ("warn", "raise_kl", "stop")
WATCHED = {  # limit -> fact, whether it is a least value
    "max_kl": ("sampled_kl", False),
    "min_entropy": ("sampled_entropy", True),
    "max_gap": ("sampler_gap", False),
    "max_zero_advantage": ("zero_advantage", False),
    "max_duplicates": ("duplicates", False),
}
LARGEST_SCALE = 100.0


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Limits, each None for none, and what happens when one is passed on `patience` rollouts in a row."""

    max_kl: float | None = None  # divergence from the reference, nats per token
    min_entropy: float | None = None  # nats per token
    max_gap: float | None = None  # mean |log-prob of the sampler - log-prob of the trainer|
    max_zero_advantage: float | None = None  # share of samples in groups whose rewards are all equal
    max_duplicates: float | None = None  # share of samples that repeat another one of their group
    patience: int = 3
    action: str = "warn"  # warn | raise_kl | stop
    factor: float = 2.0  # by which raise_kl multiplies the weight; divided again once all is well

    def __post_init__(self):
        if self.action not in ACTIONS:
            raise UserError(
                "rl.guards.action", got=f"{self.action!r}", expected=f"one of {', '.join(ACTIONS)}", do="choose one"
            )
        if self.patience < 1 or not self.factor > 1:
            raise UserError(
                "rl.guards",
                got=f"patience {self.patience}, factor {self.factor}",
                expected="1 or more, more than 1",
                do="fix",
            )


def check_measured(config: GuardConfig, measured: Collection[str]) -> None:
    """Raises UserError for a limit of a fact that rollouts do not have.

    Args:
      config: the limits.
      measured: names of the facts.
    """
    for limit, (fact, _) in WATCHED.items():
        bound = getattr(config, limit)
        if bound is not None and fact not in measured:
            raise UserError(
                f"rl.guards.{limit}",
                got=bound,
                expected=f"none where {fact} is not measured (by flow_grpo, or without a reference: settings.beta 0)",
                do="leave it out",
            )


class Guards:
    """Counts how long every limit has been passed."""

    def __init__(self, config: GuardConfig):
        self._config = config
        self._counts: dict[str, int] = {}
        self.kl_scale = 1.0  # of the divergence's weight

    def watch(self, rollout: int, facts: Mapping[str, float]) -> None:
        """Takes the means of a rollout.

        Args:
          rollout: its number, for messages.
          facts: name -> mean.

        Raises:
          UserError: a limit was passed for too long, and the action is to stop.
        """
        passed = False
        for limit, (fact, least) in WATCHED.items():
            bound = getattr(self._config, limit)
            if bound is None:
                continue
            beyond = facts[fact] < bound if least else facts[fact] > bound
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
                expected="it within",
                do="change the limit and resume, or start another run with a lower learning rate "
                "or a larger settings.beta",
            )
        print(f"warning: {what}", file=sys.stderr)

    def state(self) -> dict:
        """JSON-serialisable."""
        return {"counts": dict(self._counts), "kl_scale": self.kl_scale}

    def restore(self, state: dict) -> None:
        """Continues where `state` was taken."""
        self._counts, self.kl_scale = dict(state["counts"]), state["kl_scale"]
