"""The demo world as a data source: every item is rendered on access and depends on the seed and its index only.

The path of a source is its split, one of `world.prompts.SPLITS`.
"""

import dataclasses
import math
from typing import Annotated

import numpy as np

from blip3o_jax.config import schema
from blip3o_jax.config.schema import Count, Range, Seed
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.example import Example
from blip3o_jax.demo.world import edits, prompts
from blip3o_jax.demo.world.render import SMALLEST, render
from blip3o_jax.demo.world.scenes import MAX_LETTERS, UNITS, Background, Scene
from blip3o_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the kind `world`."""

    seed: Seed = 0
    size: Annotated[int, Range(SMALLEST, 4096)] = UNITS  # side of the images in pixels
    count: Count = 1_000_000  # items per epoch
    wording: str = "mixed"  # of captions: template | paraphrase | mixed | description
    shares: dict = dataclasses.field(
        default_factory=dict
    )  # task of captions or kind of edits -> relative frequency; default: all
    lengths: tuple[float, ...] = prompts.LENGTHS  # relative frequencies of signs with one to five letters
    plain: bool = False  # uniform background


class World:
    """Items of one task: captioned images, edits, or images to reconstruct."""

    def __init__(self, source: SourceConfig):
        options = schema.from_dict(Options, source.options, f"options of {source.path}")
        known = edits.KINDS if source.task == "edit" else prompts.TASKS
        _check(source, options, known)
        self._task, self._split, self._options = source.task, source.path, options
        self._shares = dict(options.shares) or dict(known)
        items = {"t2i": self._captioned, "edit": self._edited, "reconstruct": self._kept}
        if source.task not in items:
            raise UserError(f"{source.path}: world with task {source.task}", expected=" | ".join(items), do="use one")
        self._item = items[source.task]

    def __len__(self) -> int:
        return self._options.count

    def __getitem__(self, index: int) -> Example:
        return self._item(int(index), f"world:{self._split}:{self._task}:{index}")

    def _sample(self, index: int) -> tuple[prompts.Sample, np.ndarray]:
        options = self._options
        sample = prompts.sample(index, options.seed, self._shares, self._split, options.wording, options.lengths)
        return sample, self._image(sample.scene)

    def _image(self, scene: Scene) -> np.ndarray:
        if self._options.plain:
            scene = dataclasses.replace(scene, background=Background())
        return render(scene, self._options.size)

    def _captioned(self, index: int, name: str) -> Example:
        sample, image = self._sample(index)
        return Example("t2i", sample.caption, image, name=name, metadata=sample.metadata)

    def _kept(self, index: int, name: str) -> Example:
        sample, image = self._sample(index)
        return Example("reconstruct", None, image, name=name, metadata=sample.metadata)

    def _edited(self, index: int, name: str) -> Example:
        options = self._options
        edit = edits.sample(index, options.seed, self._shares, self._split)
        before, after = self._image(edit.source), self._image(edit.target)
        origin = {"index": index, "seed": options.seed, "kinds": self._shares, "split": self._split}
        return Example("edit", edit.instruction, after, (before,), name, {"kind": edit.kind, "edit": origin})


def _check(source: SourceConfig, options: Options, known: dict[str, float]) -> None:
    """Raises UserError for invalid options."""

    def refuse(what, got, expected):
        raise UserError(f"data source world:{source.path}: {what} {got!r}", expected=expected, do="correct it")

    if source.path not in prompts.SPLITS:
        refuse("split", source.path, f"the path to be one of {', '.join(prompts.SPLITS)}")
    if options.wording not in prompts.WORDINGS:
        refuse("options.wording", options.wording, f"one of {', '.join(prompts.WORDINGS)}")
    if source.task == "edit" and options.wording != "mixed":
        refuse("options.wording", options.wording, "mixed: instructions of edits have no template")
    if len(options.lengths) != MAX_LETTERS or min(options.lengths) < 0 or not sum(options.lengths) > 0:
        refuse("options.lengths", options.lengths, f"{MAX_LETTERS} shares, none negative, not all 0")
    if source.task == "edit" and options.lengths != prompts.LENGTHS:
        refuse("options.lengths", options.lengths, "the default: they are of captions")
    for name, share in options.shares.items():
        if name not in known:
            refuse("options.shares", name, f"some of {', '.join(known)} for task {source.task}")
        if not isinstance(share, (int, float)) or not 0 < share < math.inf:
            refuse(f"options.shares.{name}", share, "a positive, finite number")
