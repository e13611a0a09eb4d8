"""The table of batch fields, with dtype, shape and maker of each.

T positions, R reference images, N codes of an image, P side of the tokenizer's input, Y X pixels.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from blip3o_jax.data.config import Layout
    from blip3o_jax.data.transforms import Images


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of `types.Batch`."""

    dtype: Any
    dims: str  # dimensions of one row: letters as above, or `latent`
    make: "Callable[[Images], np.ndarray] | None" = None  # makes it from an item's images; None: made from its text

    def shape(self, layout: "Layout") -> tuple[int, ...]:
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

    def zeros(self, layout: "Layout", rows: int | None = None) -> np.ndarray:
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
