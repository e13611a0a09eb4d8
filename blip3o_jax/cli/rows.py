"""Reads the prompts of sample.py from its command line and prompts file, each with its own settings."""

import argparse
import dataclasses
import difflib
import os
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from blip3o_jax.command_line import value_of
from blip3o_jax.config.registry import check_trusted
from blip3o_jax.config.schema import convert_value
from blip3o_jax.convert.adapters import weighted
from blip3o_jax.data.images import load_image
from blip3o_jax.data.prompt_file import Entry, read_prompts
from blip3o_jax.diffusion.samplers import SAMPLERS
from blip3o_jax.errors import UserError, require
from blip3o_jax.generate.references import SHARED
from blip3o_jax.generate.settings import Settings, make_settings
from blip3o_jax.rl.rewards import REWARDS
from blip3o_jax.text.tasks import TASKS, find

SETTINGS = typing.get_type_hints(Settings, include_extras=True)
MODEL = {"checkpoint": None, "dtype": "auto", "image_tokenizer": None, "diffusion": None, "adapter": ()}
"""Arguments that all images share, with their defaults."""
COLUMNS = ("image", "task", *SETTINGS, *MODEL)
CHOICE = ("candidate", "candidate_reward", "candidate_rewards", "dropped")
FACTS = ("file", "checkpoint_id", "version", "index", "token_passes", *CHOICE, "scores", "metadata")
"""Fields of a record that describe the result, not the request."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One requested prompt."""

    prompt: str
    images: tuple[str, ...]
    task: str
    settings: Settings
    wanted: tuple[int, ...]  # indices of the images to generate, ascending
    metadata: dict[str, Any]  # other columns
    model: dict[str, Any]  # values of MODEL in the row
    checkpoint_id: str | None  # model that generated the recorded image
    source: str = dataclasses.field(compare=False)  # file and line that name the images; empty: the command line does

    @property
    def run_settings(self) -> Settings:
        """The settings shared by rows of one run; every prompt keeps its own seed."""
        return dataclasses.replace(self.settings, num_images_per_prompt=self.wanted[-1] + 1, seed=0)

    def precedes(self, other: "Row") -> bool:
        """Whether `other` is the record of a later image of the same prompt."""
        alike = dataclasses.replace(self, wanted=other.wanted) == other
        return alike and self.checkpoint_id is not None and self.wanted[-1] < other.wanted[0]


def read_rows(arguments: argparse.Namespace) -> list[Row]:
    """Reads prompts with their images, tasks and settings.

    Reconstructions have one row per image; the records of several images of one prompt become one row.

    Raises:
      UserError: no prompt, an unreadable file, values out of range, or images that do not fit the task.
    """
    flags = {name: getattr(arguments, name) for name in SETTINGS}
    make_settings(**flags)
    entries = [Entry("--prompt", prompt, (), None, {}) for prompt in arguments.prompt or ()]
    if arguments.prompts_file is not None:
        entries += read_prompts(arguments.prompts_file, COLUMNS)
    elif not entries and arguments.task is not None and not find(arguments.task).needs_text:
        entries = [Entry("--image", "", (), None, {})]
    require(entries, "prompt", "none", "--prompt TEXT or --prompts_file FILE", "give one")
    rows: list[Row] = []
    for entry in entries:
        for name, table in (("task", TASKS), ("sampler", SAMPLERS), ("reward", REWARDS)):
            if isinstance(value := entry.values.get(name), str):
                check_trusted(table, value, getattr(arguments, name), name, entry.where)
        settings = make_settings(**flags | _values(entry))
        for row in _rows(entry, settings, arguments):
            if rows and rows[-1].precedes(row):
                row = dataclasses.replace(row, wanted=rows.pop().wanted + row.wanted)
            rows.append(row)
    if len({row.task == "reconstruct" for row in rows}) > 1:
        raise UserError(
            "task", got="reconstruct beside other tasks", expected="one kind of task", do="run it separately"
        )
    _say_unknown(arguments.prompts_file, rows)
    _say_overridden(arguments.prompts_file, flags, entries, rows)
    count = len(arguments.prompt or ())
    if count == len(arguments.image or ()) > 1 and rows[0].task != "reconstruct":
        print(f"note: {SHARED.format(count)}; for one each, use --prompts_file", file=sys.stderr)
    return rows


def _rows(entry: Entry, settings: Any, arguments: argparse.Namespace) -> Iterator[Row]:
    values = entry.values
    images = entry.images if values.get("image") is not None else tuple(arguments.image or ())
    task = entry.task or arguments.task or ("edit" if images else "t2i")
    if find(task).has_references:
        images = images or tuple(arguments.image or ())  # the server does not keep uploads, so its records have none
    beside = os.path.dirname(arguments.prompts_file or "")  # where images are if not in the working directory
    images = tuple(
        near if not os.path.exists(image) and os.path.exists(near := os.path.join(beside, image)) else image
        for image in images
    )
    what, there = entry.named("image"), not find(task).has_references or images
    require(there, what, f"none for task {task}", "an image", "give --image FILE")
    entry.check(task, images)
    if task == "reconstruct":
        for name, default in (("num_images_per_prompt", 1), ("best_of", 1), ("reward", None)):
            value = getattr(settings, name)
            require(value == default, entry.named(name), f"{value} for task reconstruct", "none", "leave it out")
    wanted, identity, metadata = range(settings.num_images_per_prompt), None, {}
    if entry.is_record:
        index, identity, metadata = values["index"], values["checkpoint_id"], values.get("metadata", {})
        good = type(index) is int and index in wanted
        require(good, f"{entry.where}: index", index, f"0 to {len(wanted) - 1}, below num_images_per_prompt")
        require(isinstance(metadata, dict), f"{entry.where}: metadata", metadata, "an object")
        wanted = [index]
    ours = {"prompt", *COLUMNS, *(FACTS if entry.is_record else ())}
    metadata = {name: value for name, value in values.items() if name not in ours} | metadata
    model = {name: values[name] for name in MODEL if values.get(name) is not None}
    for name, value in model.items():
        if name == "adapter":
            value, where = ([[value, 1.0]] if isinstance(value, str) else value), f"{entry.where}: {name}"
            require(isinstance(value, list), where, value, "a directory, or a list of [directory, scale]")
            pairs = convert_value(tuple[tuple[str, float], ...], value, where)
            model[name] = weighted([path for path, _ in pairs], [scale for _, scale in pairs])
        else:
            require(isinstance(value, str), f"{entry.where}: {name}", value, "text")
    source = entry.where if entry.images else ""
    for group in [(image,) for image in images] if task == "reconstruct" else [images]:
        yield Row(entry.prompt, group, task, settings, tuple(wanted), metadata, model, identity, source)


def read_images(rows: Sequence[Row], kept: int) -> dict[str, Image.Image]:
    """Checks the images of all rows by reading them, and returns the first `kept` by path: all may not fit into memory.

    Raises:
      UserError: an image cannot be read; the message names the line of the prompts file that names it.
    """
    read: dict[str, Image.Image] = {}
    places: dict[str, str] = {}
    for path, where in ((path, row.source) for row in rows for path in row.images):
        places.setdefault(path, where)
    for path, where in places.items():
        try:
            image = load_image(path)
        except UserError as error:
            if where:
                error.args = (f"{where}: {error}",)
            raise
        read |= {path: image} if len(read) < kept else {}
    return read


def _values(entry: Entry) -> dict[str, Any]:
    """Returns the settings given in a row."""
    found = {}
    for name in SETTINGS.keys() & entry.values.keys():
        value, where = entry.values[name], f"{entry.where}: {name}"
        convert = value_of if isinstance(value, str) else convert_value
        found[name] = convert(SETTINGS[name], value, where)
    return found


def model_of(arguments: argparse.Namespace, rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the values of MODEL, from flags or else rows; raises UserError if rows differ in one without a flag."""
    model, adapters = {}, weighted(arguments.adapter or (), arguments.adapter_scale or ()) or None
    for name, default in MODEL.items():
        given = {row.model[name] for row in rows if name in row.model}
        flag = adapters if name == "adapter" else getattr(arguments, name)
        if flag is None and len(given) > 1:
            raise UserError(name, got=", ".join(sorted(map(str, given))), expected="one for all", do=f"give --{name}")
        model[name] = flag if flag is not None else next(iter(given), default)
    if arguments.checkpoint is None and model["checkpoint"] == "embedded":
        model["checkpoint"] = None
    return model


def _say_unknown(path: str | None, rows: Sequence[Row]) -> None:
    """Prints a note about columns that are recorded as metadata only."""
    unknown = sorted({str(name) for row in rows for name in row.metadata if row.checkpoint_id is None})
    if unknown:
        near = [(name, difflib.get_close_matches(name, COLUMNS, 1)) for name in unknown]
        named = [f"{name} (did you mean {match[0]}?)" if match else name for name, match in near]
        print(f"note: prompts_file: {path}: kept as metadata: {', '.join(named)}", file=sys.stderr)


def _say_overridden(path: str | None, flags: dict[str, Any], entries: Sequence[Entry], rows: Sequence[Row]) -> None:
    """Prints a note about flags that have no effect, since every row has a value of its own and some another one."""
    default = Settings()
    given = [name for name, value in flags.items() if value != getattr(default, name)]
    own = [name for name in given if all(name in entry.values for entry in entries)]
    if idle := [name for name in own if any(getattr(row.settings, name) != flags[name] for row in rows)]:
        shown = ", ".join(f"--{name}" for name in idle)
        print(f"note: prompts_file: {path}: no effect, as every row sets it: {shown}", file=sys.stderr)
