"""Configuration of the data layer. It imports neither Grain nor a model, so every command can read it."""

import dataclasses
from typing import Annotated

from blip3o_jax.config import TokenIds
from blip3o_jax.config.schema import Count, Named, OneOf, Positive, Range, Seed, Share, Text
from blip3o_jax.data.fields import FIELDS
from blip3o_jax.errors import UserError, require
from blip3o_jax.text.tasks import TASKS

TEXT_KEYS = ("caption", "text", "txt", "prompt", "instruction")
"""Where a caption is looked for among the fields of an item, in this order."""
PARTS = ("all", "train", "held_out")
"""Parts of a source that has no division of its own."""


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One data set of a mixture."""

    kind: str  # a row of sources.SOURCES, or package.module:attribute
    path: str  # file, directory or pattern; for tfds a name or directory, `NAME[/config][:split]`; for world the split
    task: Annotated[str, Named(TASKS)] = "t2i"
    weight: Positive = 1.0  # see DataConfig.weighting
    options: dict = dataclasses.field(default_factory=dict)  # of the kind, see the `Options` class beside its reader
    without_text: bool = False  # rows for the guidance of image tokens: captions and instructions are left out
    part: Annotated[str, OneOf(*PARTS)] = "all"  # every tenth image is held out
    caption: Text | None = None  # of items that have none


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The mixture and how it is read. Threads, workers and prefetching never change the rows or their order."""

    sources: tuple[SourceConfig, ...]
    batch_size: Count  # rows of the global batch, over all processes
    seed: Seed = 0
    shuffle: bool = True
    weighting: Annotated[str, OneOf("share", "repetition")] = "share"  # share of the rows, or copies of the source
    num_workers: Annotated[int, Range(0, 1024)] = 0  # processes; 0 reads in threads of this one
    num_threads: Annotated[int, Range(0, 1024)] = 2  # per process; 0 reads in the caller
    prefetch: Annotated[int, Range(1, 4096)] = 2  # batches kept ready per process
    max_broken_share: Share = 0.01  # of the items read; the run stops above it

    def __post_init__(self):
        require(len(self.sources) > 0, "data.sources", "none", "at least one source", "add one")


@dataclasses.dataclass(frozen=True)
class Layout:
    """What one row of a batch holds: the model's side of the data."""

    fields: tuple[str, ...]  # optional fields of types.Batch to fill
    height: int  # pixels of target_pixels and ref_pixels
    width: int
    tokenizer_size: int  # side of the image tokenizer's input, pixels
    num_image_tokens: int  # codes of one image, N
    tokens: TokenIds
    length: int = 0  # positions of a row, T
    max_references: int = 0  # R
    pool_scale: int = 1
    latent_shape: tuple[int, ...] = ()  # y x C, where a latent is among the fields
    loss_on: str = "all"  # all | assistant
    crop_before_tokenizing: bool = False  # false: the tokenizer sees the whole image squashed, as the reference

    def __post_init__(self):
        optional = [name for name, field in FIELDS.items() if field.make]
        for name in self.fields:
            require(name in optional, "layout.fields", f"{name!r}", f"one of {', '.join(optional)}", "fix it")
            if name.startswith("ref_") and not self.max_references:
                raise UserError(f"layout.fields: {name} with max_references 0", expected="1 or more", do="raise it")
            if name.endswith("_latent") and not self.latent_shape:
                raise UserError("layout.latent_shape: missing", expected=f"the shape of {name}", do="add it")
