"""From examples to rows, from rows to the arrays of a batch.

Shapes: B batch, T positions, R reference images, N codes of an image, P side of the tokenizer's input, Y X pixels.

Source: the reference's data set code (squash to the tokenizer's square; resize of the shorter side and centre crop).
Differs from the reference: items that do not fit are reported, not cut or replaced at random; a reconstruction refers
to its own target.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax.data import images
from blip3o_jax.data.config import Layout
from blip3o_jax.data.example import BrokenItem, Example, Picture
from blip3o_jax.errors import UserError
from blip3o_jax.text import sequence as sequence_lib
from blip3o_jax.text import tasks
from blip3o_jax.text.tokenizer import Tokenizer

Row = dict[str, Any]


class MakeRow:
    """Turns an example into one row: its `sequence`, and the arrays of `Layout.fields`."""

    def __init__(self, layout: Layout, tokenizer: Tokenizer | None):
        """Takes the layout, and the tokenizer; without one, rows have no text (image-only stages)."""
        self._layout = layout
        self._tokenizer = tokenizer

    def __call__(self, example: Example) -> Row:
        """The row of one example.

        Raises:
          BrokenItem: no or too long text, an unreadable image, more references than the layout holds.
          UserError: precomputed arrays are missing or of another shape: the source does not fit the model.
        """
        task = tasks.find(example.task)
        references = example.references if task.has_references else ()
        references = (example.target,) if task.target_is_reference else references
        num_refs = len(references) or len(example.arrays.get("ref_codes", ()))
        row: Row = {}
        if self._tokenizer is not None:
            if task.has_references and not num_refs:
                raise BrokenItem(example.name, "no reference image")
            if num_refs > self._layout.max_references:
                limit = self._layout.max_references
                raise BrokenItem(example.name, f"{num_refs} reference images, of which a row holds {limit}")
            row["sequence"] = self._sequence(example, num_refs)
            row["ref_mask"] = np.arange(self._layout.max_references) < num_refs
        row |= self._images(example, references)
        row |= self._arrays(example)
        return row

    def _sequence(self, example: Example, num_refs: int) -> sequence_lib.Sequence:
        layout = self._layout
        if example.text is None and tasks.find(example.task).needs_text:
            raise BrokenItem(example.name, "no caption")
        built = sequence_lib.build(
            example.task,
            example.text or "",
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

    def _images(self, example: Example, references: Sequence[Picture | None]) -> Row:
        layout, row, name = self._layout, {}, example.name
        same = tasks.find(example.task).target_is_reference  # its reference is the target

        @functools.cache
        def load(slot: int):
            return _load(example.target if slot == 0 else references[slot - 1], name)

        @functools.cache
        def fitted(field: str, slot: int) -> np.ndarray:
            return _fitted(self._target if field == "pixels" else self._tokenized, load(slot), name)

        if "target_pixels" in layout.fields:
            row["target_pixels"] = fitted("pixels", 0)
        if "target_tokenizer_pixels" in layout.fields:
            row["target_tokenizer_pixels"] = fitted("tokenizer_pixels", 0)
        if "ref_tokenizer_pixels" in layout.fields:
            pixels = np.zeros((layout.max_references, layout.tokenizer_size, layout.tokenizer_size, 3), np.float32)
            for index in range(len(references)):
                pixels[index] = fitted("tokenizer_pixels", 0 if same else 1 + index)
            row["ref_tokenizer_pixels"] = pixels
        if "ref_pixels" in layout.fields:
            if references:
                row["ref_pixels"] = fitted("pixels", 0 if same else 1)
            else:
                row["ref_pixels"] = np.zeros((layout.height, layout.width, 3), np.float32)
        return row

    def _target(self, image) -> np.ndarray:
        return images.target_pixels(image, self._layout.height, self._layout.width)

    def _tokenized(self, image) -> np.ndarray:
        layout = self._layout
        crop = (layout.height, layout.width) if layout.crop_before_tokenizing else None
        return images.tokenizer_pixels(image, layout.tokenizer_size, crop)

    def _arrays(self, example: Example) -> Row:
        layout, given = self._layout, dict(example.arrays)
        codes, latent = (layout.num_image_tokens,), layout.latent_shape
        task = tasks.find(example.task)
        if task.target_is_reference:
            given |= {"ref_codes": given["target_codes"][None]} if "target_codes" in given else {}
            given |= {"ref_latent": given["target_latent"]} if "target_latent" in given else {}
        row = {}
        if "target_codes" in layout.fields:
            row["target_codes"] = _checked(given, "target_codes", codes, example.name).astype(np.int32)
        if "target_latent" in layout.fields:
            row["target_latent"] = _checked(given, "target_latent", latent, example.name).astype(np.float32)
        if "ref_codes" in layout.fields:
            row["ref_codes"] = np.zeros((layout.max_references, *codes), np.int32)
            if task.has_references:
                count = len(given.get("ref_codes", ()))
                row["ref_codes"][:count] = _checked(given, "ref_codes", (count, *codes), example.name)
        if "ref_latent" in layout.fields:
            row["ref_latent"] = np.zeros(latent, np.float32)
            if task.has_references:
                row["ref_latent"] = _checked(given, "ref_latent", latent, example.name).astype(np.float32)
        return row


def _load(picture: Picture | None, name: str):
    if picture is None:
        raise BrokenItem(name, "no image, only precomputed arrays")
    try:
        return images.load_image(picture)
    except UserError as error:
        raise BrokenItem(name, str(error)) from None


def _fitted(transform, image, name: str) -> np.ndarray:
    try:
        return transform(image)
    except UserError as error:
        raise BrokenItem(name, str(error)) from None


def _checked(arrays: Mapping[str, np.ndarray], key: str, shape: tuple[int, ...], name: str) -> np.ndarray:
    got = arrays[key].shape if key in arrays else "nothing"
    if got != shape:
        raise UserError(
            f"{name}: {key} is {got}", expected=f"the shape {shape}", do="precompute the source with this model"
        )
    return arrays[key]


def collate(rows: Sequence[Row], layout: Layout) -> dict[str, np.ndarray]:
    """Stacks rows to the fields of `types.Batch` that are in use; shapes depend on the layout only.

    Rows without text give sequences of no positions.
    """
    if "sequence" in rows[0]:
        sequences = [row["sequence"] for row in rows]
        arrays = sequence_lib.stack(sequences, layout.length, layout.tokens.pad)
        arrays["ref_mask"] = np.stack([row["ref_mask"] for row in rows])
    else:
        count = len(rows)
        arrays = {"tokens": np.zeros((count, 0), np.int32), "length": np.zeros(count, np.int32)}
        arrays |= {"loss_mask": np.zeros((count, 0), bool), "image_slot": np.zeros((count, 0), np.int32)}
        arrays |= {"window_start": np.zeros(count, np.int32), "ref_mask": np.zeros((count, 0), bool)}
    return arrays | {field: np.stack([row[field] for row in rows]) for field in layout.fields}
