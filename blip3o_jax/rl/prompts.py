"""Prompts to learn on, drawn from data sources: their texts, references and descriptions; target pictures are left.

Every source is gone through in an order of its own, shuffled anew for every epoch. A position is how many prompts were
drawn from each source, so that a resumed run draws what the uninterrupted one draws.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax.data.config import DataConfig
from blip3o_jax.data.example import BrokenItem, Example
from blip3o_jax.data.images import load_image
from blip3o_jax.data.sources import open_source
from blip3o_jax.errors import UserError
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.text import tasks

TRIES = 16  # items in a row that may be broken
PROBE = 128  # prompts of every source that are looked at before the run starts


@dataclasses.dataclass(frozen=True)
class Task:
    """A prompt with what its rewards are told."""

    prompt: Prompt
    metadata: Mapping[str, Any]


class PromptStream:
    """Draws prompts of a mixture.

    Args:
      config: the mixture; of a data source with targets, these are not read.

    Raises:
      UserError: a source that cannot be opened, or without a readable prompt, or whose text is left out.
    """

    def __init__(self, config: DataConfig):
        if any(source.without_text for source in config.sources):
            raise UserError("data.sources", got="one without_text", expected="prompts to learn on", do="leave it out")
        self._config = config
        self._sources = [open_source(source) for source in config.sources]
        weights = np.array([source.weight for source in config.sources], float)
        if config.weighting == "repetition":
            weights *= [len(source) for source in self._sources]
        self._shares = weights / weights.sum()
        self._drawn = [0] * len(self._sources)

    def draw(self, count: int) -> list[Task]:
        """The next `count` prompts."""
        tasks = []
        for _ in range(count):
            rng = np.random.default_rng((self._config.seed, sum(self._drawn), 3))
            number = int(rng.choice(len(self._shares), p=self._shares))
            tasks.append(self._read(number, self._drawn[number]))
            self._drawn[number] += 1
        return tasks

    def probe(self) -> list[Task]:
        """The first prompts of every source, so that mistakes are found before anything is sampled."""
        return [self._read(number, index) for number, source in enumerate(self._sources)
                for index in range(min(len(source), PROBE // len(self._sources)))]  # fmt: skip

    def state(self) -> list[int]:
        """Prompts drawn from each source."""
        return list(self._drawn)

    def restore(self, state: Sequence[int]) -> None:
        """Continues where `state` was taken.

        Raises:
          UserError: it is the position in another mixture.
        """
        if len(state) != len(self._sources):
            raise UserError(
                "data.sources",
                got=len(self._sources),
                expected=f"{len(state)}, as in the checkpoint",
                do="set them back",
            )
        self._drawn = list(state)

    def _read(self, number: int, position: int) -> Task:
        source = self._sources[number]
        for offset in range(TRIES):
            epoch, index = divmod(position + offset, len(source))
            if self._config.shuffle:
                index = int(_order(self._config.seed, number, epoch, len(source))[index])
            try:
                return as_task(source[index])
            except BrokenItem as error:
                reason = f"{error.name}: {error.reason}"
        raise UserError(
            f"data source {self._config.sources[number].path}: {reason}",
            expected=f"a readable prompt among {TRIES} in a row",
            do="mend the data",
        )


def as_task(example: Example) -> Task:
    """The prompt of an example.

    Raises:
      BrokenItem: there is no text, or a picture that it needs cannot be read.
    """
    task = tasks.find(example.task)
    example.needed_text()
    pictures = (example.target,) if task.target_is_reference else example.references if task.has_references else ()
    if task.has_references and not pictures:
        raise BrokenItem(example.name, "no reference image")
    try:
        references = tuple(load_image(picture) for picture in pictures)
    except UserError as error:
        raise BrokenItem(example.name, str(error)) from error
    return Task(Prompt(example.task, example.text or "", references), dict(example.metadata))


@functools.lru_cache(maxsize=8)
def _order(seed: int, number: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, number, epoch, 4)).permutation(size)
