"""Weighted sums of rewards. A reward that raises, hangs or returns bad values stops the run with its name.

N images of N prompts.
"""

import dataclasses
import functools
import inspect
import queue
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from blip3o_jax.config import registry
from blip3o_jax.config.schema import Named, Positive
from blip3o_jax.errors import NoAnswer, UserError, require
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.rl.rewards import REWARDS
from blip3o_jax.text import tasks
from blip3o_jax.train import distributed
from blip3o_jax.types import RewardInput

Inputs = Sequence[RewardInput]


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """One reward of a mixture."""

    name: Annotated[str, Named(REWARDS)]  # a key of rewards.REWARDS, or package.module:attribute
    weight: float = 1.0
    options: dict = dataclasses.field(default_factory=dict)  # of the reward
    label: str | None = None  # name in the logs; default: `name`
    kinds: tuple[str, ...] = ()  # of prompts that it scores, see `kind_of`; default: all
    timeout: Positive = 600.0  # seconds for the images of one call

    @property
    def shown(self) -> str:
        """Name in the logs."""
        return self.label or self.name.rpartition(":")[2]


def kind_of(one: RewardInput | Prompt) -> str:
    """Returns the kind of a prompt: `tag` of its metadata, or else its task."""
    return str(one.metadata.get("tag") or tasks.name_of(one.task))


class Judge:
    """Scores images by a weighted sum of the rewards that score their kind of prompt.

    `where` names the setting in messages.

    Raises:
      UserError: a reward does not exist or does not take its options, or two have one label.
    """

    def __init__(self, configs: Sequence[RewardConfig], where: str = "rl.rewards"):
        require(configs, where, "none", "at least one", "name a reward")
        self._configs, self._where = tuple(configs), where
        distinct = len(set(self.labels)) == len(configs)
        require(distinct, where, f"the labels {', '.join(self.labels)}", "no two alike", "label one")
        self._rewards = [_opened(config) for config in configs]

    @property
    def labels(self) -> list[str]:
        """Names of the rewards in the logs."""
        return [config.shown for config in self._configs]

    @property
    def needs_metadata(self) -> bool:
        """Whether one of the rewards scores no prompt without metadata."""
        found = (registry.resolve(REWARDS, config.name, "reward") for config in self._configs)
        return any(getattr(reward, "needs_metadata", False) for reward in found)

    def check(self, inputs: Inputs) -> None:
        """Raises UserError for prompts that none or one of their rewards cannot score; images may be missing."""
        scored = np.zeros(len(inputs), bool)
        for config, (_, check) in zip(self._configs, self._rewards, strict=True):
            own = _own(config, inputs)
            scored[own] = True
            if check is not None and len(own):
                _timed(config, check, [inputs[index] for index in own])
        if not scored.all():
            one = inputs[int(np.flatnonzero(~scored)[0])]
            raise UserError(
                f"{self._where}: prompt {one.prompt!r}",
                got=f"no reward for its kind, {kind_of(one)}",
                expected="one at least",
                do="add it to the `kinds` of a reward, or leave the prompt out",
            )

    def warn_unused(self, inputs: Inputs) -> None:
        """Prints a warning for every reward that scores none of the inputs."""
        found = ", ".join(sorted({kind_of(one) for one in inputs}))
        for config in self._configs:
            if not len(_own(config, inputs)):
                kinds = ", ".join(config.kinds)
                print(f"warning: reward {config.shown} scores prompts of kind {kinds}; found: {found}", file=sys.stderr)

    def __call__(self, inputs: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores N images.

        Returns:
          float32[N], the weighted sum, and label -> float32[N] of every reward, NaN for what it does not score.

        Raises:
          UserError: a reward cannot score a prompt, raises, takes too long, or does not return N finite numbers.
        """
        if not inputs:  # a process's share of few
            return np.zeros(0, np.float32), dict.fromkeys(self.labels, np.zeros(0, np.float32))
        self.check(inputs)
        inputs, parts = [_read_only(one) for one in inputs], {}
        for config, (reward, _) in zip(self._configs, self._rewards, strict=True):
            own, parts[config.shown] = _own(config, inputs), np.full(len(inputs), np.nan, np.float32)
            if len(own):
                values = _timed(config, reward, [inputs[index] for index in own])
                parts[config.shown][own] = _checked(config, values, len(own))
        total = sum(config.weight * np.nan_to_num(parts[config.shown]) for config in self._configs)
        return total.astype(np.float32), parts


def judged(
    judge: Judge, prompts: Sequence[Prompt], images: np.ndarray, keys: jax.Array
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Scores images uint8[N Y X 3] of N prompts, drawn with key[N]; every process scores its share.

    Returns:
      The rewards of all processes, in the form that `Judge` returns.

    Raises:
      UserError: scoring fails on one of the processes.
    """
    count = jax.process_count()
    share = -(-len(prompts) // count)
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    seeds = np.asarray(jax.vmap(jax.random.bits)(keys))
    triples = zip(prompts[mine], images[mine], seeds[mine], strict=True)
    total, parts, error = None, {}, None
    try:
        total, parts = judge([prompt.judged(image, int(seed)) for prompt, image, seed in triples])
    except Exception as raised:
        error = raised
    distributed.raise_together("rewards", error)
    if count > 1:
        missing = share - len(total)
        gathered = {
            name: multihost_utils.process_allgather(np.pad(values, (0, missing)), tiled=True)[: len(prompts)]
            for name, values in {"": total, **parts}.items()
        }
        total, parts = gathered.pop(""), gathered
    return total, parts


def known(values: np.ndarray) -> np.ndarray:
    """Returns the scores of a reward without those of prompts that it does not score."""
    return values[np.isfinite(values)]


def _own(config: RewardConfig, inputs: Inputs) -> np.ndarray:
    """Returns the indices of the inputs that a reward scores."""
    return np.array([i for i, one in enumerate(inputs) if not config.kinds or kind_of(one) in config.kinds], int)


def _opened(config: RewardConfig) -> tuple[Callable, Callable | None]:
    """Opens a reward with its options; returns it and its check, None if it has none."""
    name, options = f"reward {config.name}", config.options
    found = registry.resolve(REWARDS, config.name, "reward")
    if isinstance(found, type):
        reward = registry.make(REWARDS, config.name, "reward", options)
        return reward, getattr(reward, "check", None)
    arguments, check = _arguments(found, options), getattr(found, "check", None)
    known = arguments in (1, 3)
    require(known, name, "a function of other arguments", "(inputs), a list of RewardInput", "name such a function")
    function = found if arguments == 1 else _of_three(found)
    registry.check_arguments(found, name, *range(arguments), **options)
    return functools.partial(function, **options), check and functools.partial(check, **options)


def _arguments(function: Callable, options: dict[str, Any]) -> int | None:
    """Returns the number of arguments a function needs beside its options; None if it takes any number."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of a builtin
        return None
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return None
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.KEYWORD_ONLY)]
    return sum(parameter.name not in options for parameter in needed)


def _of_three(function: Callable) -> Callable:
    """Adapts a reward of the older signature (prompts, images, metadata)."""

    def reward(inputs: Inputs, **options: Any) -> Any:
        prompts, metadata = [one.prompt for one in inputs], [dict(one.metadata) for one in inputs]
        images = np.stack([one.image for one in inputs])
        images.flags.writeable = False
        return function(prompts, images, metadata, **options)

    return reward


def _read_only(one: RewardInput) -> RewardInput:
    """Makes arrays read-only, so that no reward changes what the next one sees."""
    image, *references = (array.view() for array in (one.image, *one.references))
    for array in (image, *references):
        array.flags.writeable = False
    return dataclasses.replace(one, image=image, references=tuple(references), metadata=dict(one.metadata))


def _timed(config: RewardConfig, function: Callable, inputs: Inputs) -> Any:
    """Calls a reward in a daemon thread, so that one that hangs cannot block the process."""
    done: queue.Queue = queue.Queue()

    def work():
        try:
            done.put((function(inputs), None))
        except BaseException as error:  # custom rewards may raise anything, even SystemExit
            done.put((None, error))

    threading.Thread(target=work, name=f"reward {config.name}", daemon=True).start()
    try:
        result, error = done.get(timeout=config.timeout)
    except queue.Empty:
        raise NoAnswer(
            f"reward {config.name}: no answer in {config.timeout:g} s",
            expected="an answer",
            do="fix it, or raise its timeout",
        ) from None
    if isinstance(error, UserError):
        raise error
    if error is not None:
        raise UserError(
            f"reward {config.name}: raised {type(error).__name__} ({error})",
            expected="no exception",
            do="fix it and run the same command again",
        ) from error
    return result


def _checked(config: RewardConfig, result: Any, count: int) -> np.ndarray:
    try:
        values = np.asarray(result)
    except Exception as error:
        raise UserError(f"reward {config.name}: {error}", expected=f"{count} numbers", do="fix it") from error
    what, real = f"reward {config.name}", values.dtype == bool or np.issubdtype(values.dtype, np.number)
    real = real and not np.iscomplexobj(values)
    require(real, what, f"values of {values.dtype}", f"{count} numbers", "fix it")
    require(values.shape == (count,), what, f"shape {values.shape}", f"({count},)", "fix it")
    with np.errstate(over="ignore"):  # too large a number becomes infinite and is refused below
        values = values.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(values))
    got = f"{values[bad[0]]} for image {bad[0]} ({len(bad)} of {count})" if len(bad) else None
    require(not len(bad), what, got, "finite numbers", "fix it and run the same command again")
    return values
