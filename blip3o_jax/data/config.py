"""Configuration of the data layer. Imports neither Grain nor a model, so that every command can read it.

Weights, seeds and sizes are plain numbers; `config.from_dict` turns the `data` section of a configuration into these.
"""

import dataclasses

from blip3o_jax.config import TokenIds, registry
from blip3o_jax.errors import UserError
from blip3o_jax.text.tasks import TASKS

IMAGE_FIELDS = ("target_pixels", "target_tokenizer_pixels", "ref_tokenizer_pixels", "ref_pixels")
ARRAY_FIELDS = ("target_codes", "ref_codes", "target_latent", "ref_latent")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One data set of a mixture."""

    kind: str  # a row of sources.SOURCES: webdataset | jsonl | folder | tfds | arrayrecord | world | prompts
    path: str  # file, directory or pattern; for tfds a name or directory, `NAME[/config][:split]`; for world the split
    task: str = "t2i"  # a key of text.tasks.TASKS, or package.module:attribute
    weight: float = 1.0  # see DataConfig.weighting
    options: dict = dataclasses.field(default_factory=dict)  # of the kind, see the `Options` class beside its reader
    without_text: bool = False  # rows for the guidance of image tokens: captions and instructions are left out

    def __post_init__(self):
        registry.check_name(TASKS, self.task, f"data source {self.path}: task")
        if not self.weight > 0:
            raise UserError(f"data source {self.path}: weight {self.weight}", expected="a positive number", do="fix it")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The mixture and how it is read. Threads, workers and prefetching never change the rows or their order."""

    sources: tuple[SourceConfig, ...]
    batch_size: int  # rows of the global batch, over all processes
    seed: int = 0
    shuffle: bool = True
    weighting: str = "share"  # weight is a share of the rows, or with "repetition" copies of the set, as the reference
    num_workers: int = 0  # processes; 0 reads in threads of this one
    num_threads: int = 2  # per process; 0 reads in the caller
    prefetch: int = 2  # batches kept ready per process
    max_broken_share: float = 0.01  # of the items read; the run stops above it

    def __post_init__(self):
        if not self.sources:
            raise UserError("data.sources", got="none", expected="at least one source", do="add one")
        if self.weighting not in ("share", "repetition"):
            raise UserError(
                "data.weighting", got=f"{self.weighting!r}", expected="share or repetition", do="choose one"
            )
        for name, low in (("batch_size", 1), ("num_workers", 0), ("num_threads", 0), ("prefetch", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise UserError(f"data.{name}", got=getattr(self, name), expected=f"{low} or more", do="raise it")
        if not 0 <= self.max_broken_share <= 1:
            raise UserError("data.max_broken_share", got=self.max_broken_share, expected="0 to 1", do="fix it")


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
    crop_before_tokenizing: bool = False  # false: the tokenizer sees the whole picture squashed, as the reference

    def __post_init__(self):
        known = IMAGE_FIELDS + ARRAY_FIELDS
        for name in self.fields:
            if name not in known:
                raise UserError("layout.fields", got=f"{name!r}", expected=f"one of {', '.join(known)}", do="fix it")
            if name.startswith("ref_") and not self.max_references:
                raise UserError(f"layout.fields: {name} with max_references 0", expected="1 or more", do="raise it")
            if name.endswith("_latent") and not self.latent_shape:
                raise UserError("layout.latent_shape: missing", expected=f"the shape of {name}", do="add it")
