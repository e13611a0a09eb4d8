"""The kinds of data sources: a table from name to what opens one."""

from blip3o_jax.data.config import SourceConfig
from blip3o_jax.data.example import Source
from blip3o_jax.data.folder import open_folder
from blip3o_jax.data.jsonl import Jsonl
from blip3o_jax.data.prompt_file import PromptFile
from blip3o_jax.data.records import ArrayRecords, Tfds
from blip3o_jax.data.webdataset import WebDataset
from blip3o_jax.data.world import World
from blip3o_jax.errors import UserError

SOURCES = {
    "webdataset": WebDataset,
    "jsonl": Jsonl,
    "folder": open_folder,
    "tfds": Tfds,
    "arrayrecord": ArrayRecords,
    "world": World,
    "prompts": PromptFile,
}


def open_source(source: SourceConfig) -> Source:
    """Opens a data set.

    Raises:
      UserError: an unknown kind, nothing there, an empty or damaged data set.
    """
    if source.kind not in SOURCES:
        raise UserError(
            f"{source.path}: kind {source.kind!r}", expected=f"one of {', '.join(SOURCES)}", do="fix the kind"
        )
    try:
        opened = SOURCES[source.kind](source)
    except OSError as error:
        raise UserError(f"{source.path}: {error}", expected="readable data", do="check the path and rights") from None
    if not len(opened):
        raise UserError(f"{source.path}: no items", expected="at least one", do="fill it or leave it out")
    return opened
