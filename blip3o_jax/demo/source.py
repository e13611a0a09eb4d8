"""The demo world as a data source: every item is rendered on access and depends on the seed and its index only.

The path of a source is its split, one of `world.prompts.SPLITS`.
"""

import dataclasses
from typing import Annotated

import numpy as np

from blip3o_jax.config.schema import Count, Positive, Range, Seed, convert_value
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.example import Example
from blip3o_jax.demo.world import edits, prompts
from blip3o_jax.demo.world.render import SMALLEST, render
from blip3o_jax.demo.world.scenes import MAX_LETTERS, UNITS, Background, Scene
from blip3o_jax.errors import require


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the kind `world`."""

    seed: Seed = 0
    size: Annotated[int, Range(SMALLEST, 4096)] = UNITS  # side of the images in pixels
    count: Count = 1_000_000  # items per epoch
    wording: str = "mixed"  # of captions: template | paraphrase | mixed | description
    shares: dict = dataclasses.field(default_factory=dict)  # task or kind of edits -> relative frequency; default: all
    lengths: tuple[float, ...] = prompts.LENGTHS  # relative frequencies of signs with one to five letters
    plain: bool = False  # uniform background


class World:
    """Items of one task: captioned images, edits, or images to reconstruct."""

    def __init__(self, source: SourceConfig):
        options = source.read_options(Options)
        known = edits.KINDS if source.task == "edit" else prompts.TASKS
        self._task, self._split, self._options = source.task, source.path, options
        self._shares = dict(options.shares) or dict(known)
        _check(source, options)
        prompts.check_names(self._shares, known, source.path, options.wording)
        items = {"t2i": self._captioned, "edit": self._edited, "reconstruct": self._captioned}
        expected = " | ".join(items)
        require(source.task in items, f"{source.path}: world with task {source.task}", None, expected, "use one")
        self._item = items[source.task]

    def __len__(self) -> int:
        return self._options.count

    def __getitem__(self, index: int) -> Example:
        return self._item(int(index), f"world:{self._split}:{self._task}:{index}")

    def _image(self, scene: Scene) -> np.ndarray:
        if self._options.plain:
            scene = dataclasses.replace(scene, background=Background())
        return render(scene, self._options.size)

    def _captioned(self, index: int, name: str) -> Example:
        options = self._options
        sample = prompts.sample(index, options.seed, self._shares, self._split, options.wording, options.lengths)
        text = sample.caption if self._task == "t2i" else None
        return Example(self._task, text, self._image(sample.scene), name=name, metadata=sample.metadata)

    def _edited(self, index: int, name: str) -> Example:
        options = self._options
        edit = edits.sample(index, options.seed, self._shares, self._split)
        before, after = self._image(edit.source), self._image(edit.target)
        origin = {"index": index, "seed": options.seed, "kinds": self._shares, "split": self._split}
        return Example("edit", edit.instruction, after, (before,), name, {"kind": edit.kind, "edit": origin})


def _check(source: SourceConfig, options: Options) -> None:
    """Raises UserError for invalid options."""
    where = f"data source world:{source.path}: options"
    for name, share in options.shares.items():
        convert_value(Positive, share, f"{where}.shares.{name}")
    lengths, edited = options.lengths, source.task == "edit"
    good = len(lengths) == MAX_LETTERS and min(lengths) >= 0 and sum(lengths) > 0
    require(good, f"{where}.lengths", lengths, f"{MAX_LETTERS} shares, none negative, not all 0", "correct it")
    for name in ("wording", "lengths"):
        got, default = getattr(options, name), getattr(Options, name)
        require(not edited or got == default, f"{where}.{name}", got, f"{default}: it is of captions", "correct it")
