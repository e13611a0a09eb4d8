"""The kinds of data sources: a table from name to what opens one. Others are named `package.module:attribute`."""

import dataclasses

from blip3o_jax.config import registry
from blip3o_jax.data import files
from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.example import Source
from blip3o_jax.data.folder import open_folder
from blip3o_jax.data.jsonl import Jsonl
from blip3o_jax.data.prompt_file import PromptFile
from blip3o_jax.data.records import ArrayRecords, Tfds
from blip3o_jax.data.webdataset import WebDataset
from blip3o_jax.errors import UserError, require

SOURCES = {
    "webdataset": WebDataset,
    "jsonl": Jsonl,
    "folder": open_folder,
    "tfds": Tfds,
    "arrayrecord": ArrayRecords,
    "world": "blip3o_jax.demo.source:World",
    "prompts": PromptFile,
}


def open_source(source: SourceConfig) -> Source:
    """Opens a data set: calls what its kind names with the source, `~` and environment variables put in.

    These are put into the path and every option whose name ends in `_dir`.

    Raises:
      UserError: an unknown kind, nothing there, an empty or damaged data set.
    """
    opener = registry.resolve(SOURCES, source.kind, f"{source.path}: kind")
    named = source.path.strip() or source.kind not in SOURCES
    require(named, f"data source {source.kind}: path", repr(source.path), "the name of what is to be read", "give it")
    options = {
        key: files.place(value) if key.endswith("_dir") and isinstance(value, str) else value
        for key, value in source.options.items()
    }
    try:
        opened = opener(dataclasses.replace(source, path=files.place(source.path), options=options))
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and source.kind in SOURCES:
            raise  # a fault of ours
        reason = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{source.path}: {reason}", expected="readable data", do="check the path and rights") from error
    good = hasattr(opened, "__len__") and hasattr(opened, "__getitem__")
    require(good, f"kind {source.kind}", f"a {type(opened).__name__}", "a data.example.Source", "return one")
    if not len(opened):
        there = "; ".join(getattr(opened, "skipped", files.Skipped()).lines())
        raise UserError(
            f"{source.path}: no items{f' ({there})' if there else ''}",
            expected="at least one",
            do="fill it or leave it out",
        )
    return opened
