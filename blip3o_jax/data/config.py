"""Configuration of the data layer, and the table of batch fields. Every command can read it, without Grain or a model.

T positions, R reference images, N codes of an image, P side of the tokenizer's input, Y X pixels.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np

from blip3o_jax.config import TokenIds
from blip3o_jax.config.schema import Count, Named, OneOf, Positive, Range, Seed, Share, Text, from_dict
from blip3o_jax.errors import require
from blip3o_jax.text.tasks import TASKS

TEXT_KEYS = ("caption", "text", "txt", "prompt", "instruction")
"""Fields that may contain a caption, in order of precedence."""
PARTS = ("all", "train", "held_out")
"""Parts of a source, for sources without a split of their own."""


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One data set of a mixture."""

    kind: str  # a row of sources.SOURCES, or package.module:attribute
    path: str  # file, directory or pattern; for tfds `NAME[/config][:split]` or a directory; for world the split
    task: Annotated[str, Named(TASKS)] = "t2i"
    weight: Positive = 1.0  # see DataConfig.weighting
    options: dict = dataclasses.field(default_factory=dict)  # of the kind: TextOptions, or the class beside its reader
    without_text: bool = False  # drop captions and instructions, to train the unconditional tokens of guidance
    part: Annotated[str, OneOf(*PARTS)] = "all"  # every tenth image is held out
    caption: Text | None = None  # caption of items without one

    def read_options(self, kind: type) -> Any:
        """Returns `options` as the dataclass `kind`; raises UserError for other keys or values than it has."""
        return from_dict(kind, self.options, f"options of {self.path}")


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """Options of the kinds `webdataset`, `arrayrecord`, and `folder` without a metadata file."""

    text_key: str = ""  # key of the caption in the JSON of an item, or `txt`; default: its text, else TEXT_KEYS


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A mixture and how it is read. Threads, workers and prefetching do not affect the rows or their order."""

    sources: tuple[SourceConfig, ...]
    batch_size: Count  # rows of the global batch, over all processes
    seed: Seed = 0
    shuffle: bool = True
    weighting: Annotated[str, OneOf("share", "repetition")] = "share"  # a weight is a share of rows, or a repeat count
    num_workers: Annotated[int, Range(0, 1024)] = 0  # reader processes; 0: threads of this process
    num_threads: Annotated[int, Range(0, 1024)] = 2  # threads per process; 0: the calling thread
    prefetch: Annotated[int, Range(1, 4096)] = 2  # batches prefetched per process
    max_broken_share: Share = 0.01  # largest share of broken items among those read; the run stops above it

    def __post_init__(self):
        require(len(self.sources) > 0, "data.sources", "none", "at least one source", "add one")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The fields of a row and their sizes, as required by a model and its objective."""

    fields: tuple[str, ...]  # optional fields of types.Batch in use
    height: int  # pixels of target_pixels and ref_pixels
    width: int
    tokenizer_size: int  # height and width of the image tokenizer's input in pixels
    num_image_tokens: int  # codes of one image, N
    tokens: TokenIds
    length: int = 0  # positions of a row, T
    max_references: int = 0  # R
    pool_scale: int = 1
    latent_shape: tuple[int, ...] = ()  # y x C, if a latent is among the fields
    loss_on: str = "all"  # all | assistant
    crop_before_tokenizing: bool = False  # tokenize the crop that the target shows; default: the whole image

    def __post_init__(self):
        optional = [name for name, field in FIELDS.items() if field.make]
        for name in self.fields:
            require(name in optional, "layout.fields", f"{name!r}", f"one of {', '.join(optional)}", "fix it")
            held = self.max_references or not name.startswith("ref_")
            require(held, f"layout.fields: {name} with max_references 0", None, "1 or more", "raise it")
            known = self.latent_shape or not name.endswith("_latent")
            require(known, "layout.latent_shape: missing", None, f"the shape of {name}", "add it")


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of `types.Batch`."""

    dtype: Any
    dims: str  # dimensions of one row: letters as above, or `latent`
    make: Callable[[Any], np.ndarray] | None = None  # makes it from `transforms.Images`; None: made from the text

    def shape(self, layout: Layout) -> tuple[int, ...]:
        """Returns the shape of one row."""
        sizes = {
            "T": (layout.length,),
            "R": (layout.max_references,),
            "N": (layout.num_image_tokens,),
            "P": (layout.tokenizer_size,),
            "Y": (layout.height,),
            "X": (layout.width,),
            "3": (3,),
            "latent": layout.latent_shape,
        }
        return tuple(size for dim in self.dims.split() for size in sizes[dim])

    def zeros(self, layout: Layout, rows: int | None = None) -> np.ndarray:
        """Returns zeros for one row, or for a batch of `rows` rows."""
        return np.zeros((() if rows is None else (rows,)) + self.shape(layout), self.dtype)


FIELDS = {
    "tokens": Field(np.int32, "T"),
    "length": Field(np.int32, ""),
    "loss_mask": Field(np.bool_, "T"),
    "image_slot": Field(np.int32, "T"),
    "window_start": Field(np.int32, ""),
    "ref_mask": Field(np.bool_, "R"),
    "target_pixels": Field(np.float32, "Y X 3", lambda item: item.pixels()),
    "target_tokenizer_pixels": Field(np.float32, "P P 3", lambda item: item.tokenizer_pixels()),
    "ref_tokenizer_pixels": Field(np.float32, "R P P 3", lambda item: item.reference_tokenizer_pixels()),
    "ref_pixels": Field(np.float32, "Y X 3", lambda item: item.reference_pixels()),
    "target_codes": Field(np.int32, "N", lambda item: item.array("target_codes")),
    "ref_codes": Field(np.int32, "R N", lambda item: item.reference_codes()),
    "target_latent": Field(np.float32, "latent", lambda item: item.array("target_latent")),
    "ref_latent": Field(np.float32, "latent", lambda item: item.reference_latent()),
}
"""Name -> field, in the order of `types.Batch`; fields with `make` are optional."""

TEXT_FIELDS = tuple(name for name, field in FIELDS.items() if field.make is None)
