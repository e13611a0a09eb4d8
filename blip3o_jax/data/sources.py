"""Opens data sources. Kinds from other packages are named `package.module:attribute`."""

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

from blip3o_jax.config import registry
from blip3o_jax.data import files
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.example import BrokenItem, Example, Source
from blip3o_jax.data.folder import open_folder
from blip3o_jax.data.jsonl import Jsonl
from blip3o_jax.data.prompt_file import PromptFile
from blip3o_jax.data.records import ArrayRecords
from blip3o_jax.data.webdataset import WebDataset
from blip3o_jax.errors import UserError, call_custom, require, type_of

HELD_OUT_EVERY = 10  # one of so many images is held out
SOURCES = {
    "webdataset": WebDataset,
    "jsonl": Jsonl,
    "folder": open_folder,
    "tfds": "blip3o_jax.data.tfds_features:Tfds",
    "arrayrecord": ArrayRecords,
    "world": "blip3o_jax.demo.source:World",
    "prompts": PromptFile,
}


def open_source(source: SourceConfig) -> Source:
    """Opens a data set.

    `~` and environment variables are expanded in the path and in options whose name ends in `_dir`.

    Raises:
      UserError: an unknown kind, or a missing, empty or damaged data set.
    """
    opener = registry.resolve(SOURCES, source.kind, f"data source {source.path}: kind")
    named = source.path.strip() or source.kind not in SOURCES
    require(named, f"data source {source.kind}: path", repr(source.path), "the name of what is to be read", "give it")
    options = _with_directories(source.options, files.place)
    placed = dataclasses.replace(source, path=files.place(source.path), options=options)
    try:
        opened = opener(placed) if source.kind in SOURCES else Custom(opener, placed)
    except OSError as error:
        raise UserError(f"{source.path}: {error}", expected="readable data", do="check the path and rights") from error
    what = f"{source.path}: no items{skipped(opened).in_brackets()}"
    require(len(opened) > 0, what, None, "at least one", "fill it or leave it out")
    if source.part == "all" and source.caption is None and not source.without_text:
        return opened
    selected = Selected(opened, source)
    require(len(selected) > 0, f"{source.path}: part {source.part}", "no image", "at least one", "add images")
    return selected


def skipped(source: Source) -> files.Skipped:
    """Returns the files that a source has skipped, if it counts them."""
    return getattr(source, "skipped", files.Skipped())


def portable_options(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of a source as JSON restores them; of directories, their names alone."""
    return json.loads(json.dumps(_with_directories(options, lambda path: os.path.basename(os.path.normpath(path)))))


def _with_directories(options: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Returns the options with changed directories, which are those whose names end in `_dir`."""
    named = {key: value for key, value in options.items() if key.endswith("_dir") and isinstance(value, str)}
    return options | {key: change(value) for key, value in named.items()}


class Custom:
    """A source from outside the package; raises UserError for whatever it does other than a `data.example.Source`."""

    def __init__(self, opener: Callable[[SourceConfig], Source], config: SourceConfig):
        self._what = f"kind {config.kind} ({config.path!r})"
        self._source = call_custom(self._what, opener, config, passed=(OSError,))
        good = hasattr(self._source, "__len__") and hasattr(self._source, "__getitem__")
        require(good, self._what, type_of(self._source), "a data.example.Source", "return one")
        self._length = call_custom(f"{self._what}: __len__", len, self._source)
        self.skipped = skipped(self._source)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        what = f"{self._what}: item {index}"
        example = call_custom(what, self._source.__getitem__, index, passed=(BrokenItem,))
        good, do = isinstance(example, Example), "return one, or raise data.example.BrokenItem"
        require(good, what, type_of(example), "a data.example.Example", do)
        return example


class Selected:
    """Applies `part`, `caption` and `without_text` of a configuration to a source.

    All items with the same image are in the same part.
    """

    def __init__(self, source: Source, config: SourceConfig):
        self._source, self._config = source, config
        self.skipped = skipped(source)
        whole = config.part == "all"
        self._items = range(len(source)) if whole else _items_of(source, config.part == "held_out")

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Example:
        example = self._source[self._items[index]]
        text = self._config.caption if example.text is None else example.text
        return dataclasses.replace(example, text="" if self._config.without_text else text)


def _items_of(source: Source, held_out: bool) -> list[int]:
    images = [_image(source, index) for index in range(len(source))]
    order = list(dict.fromkeys(images))
    chosen = set(order[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or order[1:][-1:])
    return [index for index, image in enumerate(images) if (image in chosen) is held_out]


def _image(source: Source, index: int) -> str:
    """Returns the name of an item's image."""
    try:
        example = source[index]
    except BrokenItem as error:
        return error.name
    return example.target if isinstance(example.target, str) else example.name
