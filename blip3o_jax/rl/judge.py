"""Weighted rewards of pictures, and what becomes of a reward that misbehaves: the run stops with its name.

N pictures of N prompts.
"""

import dataclasses
import difflib
import functools
import importlib
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax.errors import NoAnswer, UserError
from blip3o_jax.rl.rewards import CHECKS, REWARDS
from blip3o_jax.types import Reward


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """One reward of a mixture."""

    name: str  # a key of rewards.REWARDS, or package.module:function
    weight: float = 1.0
    options: dict = dataclasses.field(default_factory=dict)  # further arguments of the function
    label: str | None = None  # under which it is recorded; default: the name
    timeout: float = 600.0  # seconds for the pictures of one call

    def __post_init__(self):
        if not np.isfinite(self.weight):
            raise UserError(f"reward {self.name}: weight {self.weight}", expected="a finite number", do="correct it")
        if not self.timeout > 0:
            raise UserError(
                f"reward {self.name}: timeout {self.timeout}", expected="more than 0 seconds", do="correct it"
            )

    @property
    def shown(self) -> str:
        """Under which it is recorded."""
        return self.label or self.name.rpartition(":")[2]


class Judge:
    """Scores pictures by a weighted sum of rewards.

    Args:
      configs: the rewards.
      rewards: functions that take the place of named ones, or new ones.

    Raises:
      UserError: a reward that does not exist, or two under one label.
    """

    def __init__(self, configs: Sequence[RewardConfig], rewards: Mapping[str, Reward] | None = None):
        if not configs:
            raise UserError("rl.rewards", got="none", expected="at least one", do="name a reward")
        self._configs = tuple(configs)
        labels = [config.shown for config in configs]
        if len(set(labels)) < len(labels):
            raise UserError(
                "rl.rewards", got=f"the labels {', '.join(labels)}", expected="no two alike", do="label one"
            )
        known = {**REWARDS, **(rewards or {})}
        self._functions = [functools.partial(_find(config.name, known), **config.options) for config in configs]

    @property
    def labels(self) -> list[str]:
        """Names under which the rewards are recorded."""
        return [config.shown for config in self._configs]

    def check(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
        """Raises UserError for prompts that one of the rewards cannot judge."""
        for config in self._configs:
            if config.name in CHECKS:
                CHECKS[config.name](prompts, metadata)

    def __call__(
        self, prompts: Sequence[str], images: np.ndarray, metadata: Sequence[Mapping[str, Any]]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores pictures.

        Args:
          prompts: N texts.
          images: uint8[N Y X 3]; rewards may read them only.
          metadata: N descriptions.

        Returns:
          float32[N], the weighted sum, and label -> float32[N] of every reward.

        Raises:
          UserError: a reward that raises, takes too long, or returns anything but N finite numbers.
        """
        parts, images = {}, images.view()
        images.flags.writeable = False  # what one reward does to them must not be seen by the next
        for config, function in zip(self._configs, self._functions, strict=True):
            arguments = (list(prompts), images, [dict(entry) for entry in metadata])
            parts[config.shown] = _checked(config, _timed(config, function, arguments), len(prompts))
        total = sum(config.weight * parts[config.shown] for config in self._configs)
        return total.astype(np.float32), parts


def _find(name: str, known: Mapping[str, Reward]) -> Reward:
    if name in known:
        return known[name]
    module, colon, function = name.partition(":")
    if not colon:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else "write package.module:function for one of your own"
        raise UserError("reward", got=f"{name!r}", expected=f"one of {', '.join(known)}", do=hint)
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # a module of the user's: whatever it does when it is imported
        what = f"{type(error).__name__} ({' '.join(str(error).split())})"
        raise UserError(f"reward {name}: {what}", expected="an importable function", do="check the path") from error
    if not callable(found):
        raise UserError(f"reward {name}", got=f"a {type(found).__name__}", expected="a function", do="name a function")
    return found


def _timed(config: RewardConfig, function: Callable, arguments: tuple) -> Any:
    """Result of a call; a daemon thread makes it, so that one that hangs cannot hold the process."""
    done: queue.Queue = queue.Queue()

    def work():
        try:
            done.put((function(*arguments), None))
        except BaseException as error:  # whatever somebody's reward raises, SystemExit included, is told by its name
            done.put((None, error))

    threading.Thread(target=work, name=f"reward {config.name}", daemon=True).start()
    try:
        result, error = done.get(timeout=config.timeout)
    except queue.Empty:
        raise NoAnswer(
            f"reward {config.name}: no answer in {config.timeout:g} s",
            expected="one",
            do="mend it, or raise its timeout",
        ) from None
    if isinstance(error, UserError):
        raise error
    if error is not None:
        raise UserError(
            f"reward {config.name}: raised {type(error).__name__} ({error})",
            expected=f"{len(arguments[0])} numbers",
            do="mend it and run the same command again",
        ) from error
    return result


def _checked(config: RewardConfig, result: Any, count: int) -> np.ndarray:
    try:
        values = np.asarray(result)
    except Exception as error:
        raise UserError(f"reward {config.name}: {error}", expected=f"{count} numbers", do="mend it") from error
    if not (np.issubdtype(values.dtype, np.number) or values.dtype == bool) or np.iscomplexobj(values):
        raise UserError(
            f"reward {config.name}", got=f"values of {values.dtype}", expected=f"{count} numbers", do="mend it"
        )
    if values.shape != (count,):
        raise UserError(f"reward {config.name}", got=f"shape {values.shape}", expected=f"({count},)", do="mend it")
    values = values.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise UserError(
            f"reward {config.name}",
            got=f"{values[bad[0]]} for picture {bad[0]} ({len(bad)} of {count})",
            expected="finite numbers",
            do="mend it and run the same command again",
        )
    return values
