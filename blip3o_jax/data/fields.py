"""The fields of a batch in one table: shape, dtype and maker of each.

T positions, R reference images, N codes of an image, P side of the tokenizer's input, Y X pixels.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from blip3o_jax.data.config import Layout
    from blip3o_jax.data.transforms import Images

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of `types.Batch`."""

    dtype: Any
    shape: "Callable[[Layout], Shape]"  # of one row
    make: "Callable[[Images], np.ndarray] | None" = None  # from an item's images and arrays; None: from its text

    def zeros(self, layout: "Layout", rows: int | None = None) -> np.ndarray:
        """Zeros of one row, or of a batch of `rows`."""
        return np.zeros((() if rows is None else (rows,)) + self.shape(layout), self.dtype)


def _positions(layout: "Layout") -> Shape:
    return (layout.length,)


def _pixels(layout: "Layout") -> Shape:
    return layout.height, layout.width, 3


def _square(layout: "Layout") -> Shape:
    return layout.tokenizer_size, layout.tokenizer_size, 3


def _codes(layout: "Layout") -> Shape:
    return (layout.num_image_tokens,)


def _latent(layout: "Layout") -> Shape:
    return layout.latent_shape


def _each(shape: "Callable[[Layout], Shape]") -> "Callable[[Layout], Shape]":
    """Of every reference."""
    return lambda layout: (layout.max_references, *shape(layout))


FIELDS = {
    "tokens": Field(np.int32, _positions),
    "length": Field(np.int32, lambda _: ()),
    "loss_mask": Field(np.bool_, _positions),
    "image_slot": Field(np.int32, _positions),
    "window_start": Field(np.int32, lambda _: ()),
    "ref_mask": Field(np.bool_, lambda layout: (layout.max_references,)),
    "target_pixels": Field(np.float32, _pixels, lambda item: item.pixels()),
    "target_tokenizer_pixels": Field(np.float32, _square, lambda item: item.tokenizer_pixels()),
    "ref_tokenizer_pixels": Field(np.float32, _each(_square), lambda item: item.reference_tokenizer_pixels()),
    "ref_pixels": Field(np.float32, _pixels, lambda item: item.reference_pixels()),
    "target_codes": Field(np.int32, _codes, lambda item: item.array("target_codes")),
    "ref_codes": Field(np.int32, _each(_codes), lambda item: item.reference_codes()),
    "target_latent": Field(np.float32, _latent, lambda item: item.array("target_latent")),
    "ref_latent": Field(np.float32, _latent, lambda item: item.reference_latent()),
}
"""Name -> field, in the order of `types.Batch`; those with `make` are optional."""

TEXT_FIELDS = tuple(name for name, field in FIELDS.items() if field.make is None)
