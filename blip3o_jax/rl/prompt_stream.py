"""Training prompts, drawn from the same mixture of data sources as training rows.

Prompt n is that of row n of `data.pipeline`: text, references and metadata, without the target image. The position is
one number, so a resumed run draws the same prompts as an uninterrupted one.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from blip3o_jax.data.config import DataConfig
from blip3o_jax.data.example import Example, breaking
from blip3o_jax.data.images import load_image
from blip3o_jax.data.quarantine import Quarantine
from blip3o_jax.data.sources import open_source
from blip3o_jax.data.transforms import Row
from blip3o_jax.errors import UserError, require
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.text import tasks

PROBE = 128  # prompts checked before the run starts; lists of prompts are checked whole


class PromptStream:
    """Draws the prompts of a mixture, without reading target images.

    Prompts that cannot be read or that `check` refuses by a UserError are broken items: others take their places.

    Args:
      config: the mixture.
      check: called with every prompt.
      where: section of the configuration, for messages.

    Raises:
      UserError: a source cannot be opened, has no prompt that can be used, or drops its text (`without_text`).
    """

    def __init__(
        self, config: DataConfig, check: Callable[[Prompt], object] = lambda prompt: prompt, where: str = "data"
    ):
        from blip3o_jax.data import pipeline  # needs Grain, which sampling does without

        texts = not any(source.without_text for source in config.sources)
        require(texts, f"{where}.sources", "one without_text", "sources of prompts", "leave it out")
        self._config, self._where, self._say_left_out = config, where, pipeline.say_left_out
        self._sources = [open_source(source) for source in config.sources]
        self._positions = pipeline.positions(config, self._sources)

        def row(example: Example) -> dict[str, Prompt]:
            with breaking(example.name, UserError):
                prompt = as_prompt(example)
                check(prompt)
            return {"prompt": prompt}

        self._load = pipeline.LoadRow(config, self._sources, row)
        self._quarantine = Quarantine(None, config.max_broken_share)
        self._identity = pipeline.identity(config, self._sources)
        self._next = 0

    def draw(self, count: int) -> list[Prompt]:
        """Returns the next `count` prompts.

        Raises:
          UserError: too many items are broken.
        """
        return [row["prompt"] for row in self._rows(count)]

    def draw_readable(self, count: int) -> list[Prompt]:
        """Returns those of the next `count` prompts that are not broken; names the others on stderr.

        Raises:
          UserError: too many or all of them are broken.
        """
        rows = self._rows(count)
        self._say_left_out(row["broken"][0] for row in rows if row["broken"])
        good = [row["prompt"] for row in rows if not row["broken"]]
        require(good, f"{self._where}.sources", f"{count} broken", "a readable prompt", "repair them")
        return good

    def _rows(self, count: int) -> list[Row]:
        rows = [self._load(self._positions[self._next + number]) for number in range(count)]
        broken = [item for row in rows for item in row["broken"]]
        self._quarantine.add(count + len(broken), broken)
        self._next += count
        return rows

    def probe(self) -> Iterator[Prompt]:
        """Yields prompts of every source, to find mistakes before sampling: all of a list, and some, evenly spread, of
        other data. References are read one prompt at a time.

        Raises:
          UserError: too many items of lists are broken.
        """
        lists = Quarantine(None, self._config.max_broken_share)
        for number, source in enumerate(self._sources):
            whole = self._config.sources[number].kind == "prompts"
            count = len(source) if whole else min(len(source), PROBE // len(self._sources) or 1)
            indices = (part * len(source) // count for part in range(count))
            for index in indices:
                row = self._load((number, index))
                lists.add(int(whole), row["broken"][:1] if whole else ())  # the others are read in their own places
                yield row["prompt"]
        lists.finish()

    def state(self) -> dict[str, Any]:
        """Returns the JSON-serialisable position, with the identity of the mixture."""
        counts = {"reads": self._quarantine.reads, "broken": self._quarantine.broken}
        return {"next": self._next, **counts, **self._identity}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`.

        Raises:
          UserError: it belongs to another mixture.
        """
        do = "start a new workdir from the weights: init_from WORKDIR/model"
        require(isinstance(state, Mapping), "checkpoint", "a data position of an earlier version", "a newer one", do)
        for key, value in self._identity.items():
            before = state.get(key, value)  # earlier versions lack some
            require(before == value, f"data.{key}", value, f"{before}, as in the checkpoint", f"restore it, or {do}")
        self._next = state["next"]
        self._quarantine.reads, self._quarantine.broken = state["reads"], state["broken"]


def as_prompt(example: Example) -> Prompt:
    """Returns the prompt of an example.

    Raises:
      BrokenItem: the text is missing.
      UserError: an image cannot be read.
    """
    task = tasks.find(example.task)
    example.needed_text()
    images = (example.target,) if task.target_is_reference else example.references if task.has_references else ()
    references = tuple(load_image(image) for image in images)
    return Prompt(example.task, example.text or "", references, metadata=dict(example.metadata))
