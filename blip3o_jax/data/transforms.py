"""Makes rows from examples, and batches from rows.

B batch, T positions, R reference images, N codes of an image, P side of the tokenizer's input, Y X pixels.

Source: the reference's data set code (resize to the tokenizer's square; resize of the shorter side and centre crop).
Differs from the reference: items that do not fit are reported, not truncated or replaced at random; the reference image
of a reconstruction is its target.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from blip3o_jax.data import images
from blip3o_jax.data.config import FIELDS, TEXT_FIELDS, Layout
from blip3o_jax.data.example import BrokenItem, Example, breaking
from blip3o_jax.errors import UserError, require, type_of
from blip3o_jax.text import sequence as sequence_lib
from blip3o_jax.text import tasks
from blip3o_jax.text.tokenizer import Tokenizer

Row = dict[str, Any]


class MakeRow:
    """Makes a row from an example: its `sequence`, unless `tokenizer` is None, and the arrays of `Layout.fields`."""

    def __init__(self, layout: Layout, tokenizer: Tokenizer | None):
        self._layout = layout
        self._tokenizer = tokenizer

    def __call__(self, example: Example) -> Row:
        """Returns the row of an example.

        Raises:
          BrokenItem: missing or too long text, an unreadable image, or too many references.
          UserError: precomputed arrays are missing or have other shapes than the model's.
        """
        item = Images(example, self._layout)
        row: Row = {}
        if self._tokenizer is not None:
            row["sequence"] = self._sequence(example, item.num_references)
            row["ref_mask"] = np.arange(self._layout.max_references) < item.num_references
        return row | {name: FIELDS[name].make(item) for name in self._layout.fields}

    def _sequence(self, example: Example, num_refs: int) -> sequence_lib.Sequence:
        layout = self._layout
        if tasks.find(example.task).has_references and not num_refs:
            raise BrokenItem(example.name, "no reference image")
        if num_refs > layout.max_references:
            raise BrokenItem(example.name, f"{num_refs} reference images, of which a row holds {layout.max_references}")
        built = sequence_lib.build(
            example.task,
            example.needed_text(),
            self._tokenizer,
            layout.tokens,
            layout.num_image_tokens,
            num_refs=num_refs,
            pool_scale=layout.pool_scale,
            loss_on=layout.loss_on,
        )
        if len(built) > layout.length:
            raise BrokenItem(example.name, f"{len(built)} tokens, of which a row holds {layout.length}")
        return built


class Images:
    """Makes the image fields of one example.

    Attributes:
      num_references: number of reference images in the row.
    """

    def __init__(self, example: Example, layout: Layout):
        self._layout, self._example = layout, example
        self._arrays = dict(example.arrays)
        self._task = tasks.find(example.task)
        references = example.references if self._task.needs_references else ()
        self._slots = range(1, 1 + len(references))  # slot 0 is the target
        if self._task.target_is_reference:
            self._slots = range(1)
            for name in ("codes", "latent"):
                if f"target_{name}" in self._arrays:
                    own = self._arrays[f"target_{name}"]
                    self._arrays[f"ref_{name}"] = own[None] if name == "codes" else own
        codes = example.arrays.get("ref_codes", ()) if self._task.has_references else ()
        self.num_references = len(self._slots) or len(codes)
        self._made: dict[tuple[str, int], Any] = {}  # cache: reconstructions, and two kinds of pixels

    def pixels(self, slot: int = 0) -> np.ndarray:
        """Returns the autoencoder's input, f32[Y X 3]."""
        layout = self._layout
        return self._fitted("pixels", slot, lambda image: images.target_pixels(image, layout.height, layout.width))

    def tokenizer_pixels(self, slot: int = 0) -> np.ndarray:
        """Returns the image tokenizer's input, f32[P P 3]."""
        layout = self._layout
        crop = (layout.height, layout.width) if layout.crop_before_tokenizing else None
        size = layout.tokenizer_size
        return self._fitted("tokenizer", slot, lambda image: images.tokenizer_pixels(image, size, crop))

    def reference_tokenizer_pixels(self) -> np.ndarray:
        """Returns the tokenizer's input of all references, f32[R P P 3], zeros after the last."""
        result = FIELDS["ref_tokenizer_pixels"].zeros(self._layout)
        for index, slot in enumerate(self._slots):
            result[index] = self.tokenizer_pixels(slot)
        return result

    def reference_pixels(self) -> np.ndarray:
        """Returns the autoencoder's input of the first reference, f32[Y X 3]; zeros without references."""
        return self.pixels(self._slots[0]) if self._slots else FIELDS["ref_pixels"].zeros(self._layout)

    def reference_codes(self) -> np.ndarray:
        """Returns the precomputed codes of all references, i32[R N], zeros after the last."""
        result = FIELDS["ref_codes"].zeros(self._layout)
        if self._task.has_references:
            count = len(self._arrays.get("ref_codes", ()))
            result[:count] = self.array("ref_codes", (count, *result.shape[1:]))
        return result

    def reference_latent(self) -> np.ndarray:
        """Returns the precomputed latent of the first reference, f32[y x C]; zeros if the task has none."""
        return self.array("ref_latent") if self._task.has_references else FIELDS["ref_latent"].zeros(self._layout)

    def array(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """Returns a precomputed array in the dtype of its field, a key of FIELDS.

        Raises:
          UserError: the array is missing, of another type, or its shape is not `shape` (default: that of the field).
        """
        field, found = FIELDS[name], self._arrays.get(name)
        shape = field.shape(self._layout) if shape is None else shape
        good = isinstance(found, np.ndarray) and found.shape == shape
        good = good and np.can_cast(found.dtype, field.dtype, "same_kind")
        expected, do = f"{np.dtype(field.dtype)}{list(shape)}", "precompute the source with this model"
        require(good, f"{self._example.name}: {name}", type_of(found), expected, do)
        return found.astype(field.dtype)

    def _fitted(self, kind: str, slot: int, transform: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
        example = self._example
        picture = example.references[slot - 1] if slot else example.needed_target()
        with breaking(example.name, UserError):
            if ("image", slot) not in self._made:
                self._made["image", slot] = images.load_image(picture)
            if (kind, slot) not in self._made:
                self._made[kind, slot] = transform(self._made["image", slot])
        return self._made[kind, slot]


def collate(rows: Sequence[Row], layout: Layout) -> dict[str, np.ndarray]:
    """Stacks rows to the fields of `types.Batch` in use. Shapes depend only on the layout; without text T is 0."""
    if "sequence" in rows[0]:
        sequences = [row["sequence"] for row in rows]
        arrays = sequence_lib.stack(sequences, layout.length, layout.tokens.pad)
        arrays["ref_mask"] = np.stack([row["ref_mask"] for row in rows])
    else:
        textless = dataclasses.replace(layout, fields=(), length=0, max_references=0)
        arrays = {name: FIELDS[name].zeros(textless, len(rows)) for name in TEXT_FIELDS}
    return arrays | {field: np.stack([row[field] for row in rows]) for field in layout.fields}
