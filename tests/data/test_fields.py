"""The table of batch fields: it names what a batch has, and its shapes are those of the rows that are made."""

import dataclasses

import numpy as np
import pytest

from blip3o_jax import types
from blip3o_jax.data import images
from blip3o_jax.data.config import FIELDS, TEXT_FIELDS
from blip3o_jax.data.example import Example
from blip3o_jax.data.transforms import MakeRow, collate
from blip3o_jax.errors import UserError
from blip3o_jax.text.tokenizer import Tokenizer
from support.data_makers import TOKENS, number_of, picture, pixels_layout

OPTIONAL = tuple(name for name in FIELDS if name not in TEXT_FIELDS)


def test_the_table_names_the_fields_of_a_batch_in_order():
    fields = dataclasses.fields(types.Batch)
    assert tuple(FIELDS) == tuple(field.name for field in fields)
    assert TEXT_FIELDS == tuple(field.name for field in fields if field.default is dataclasses.MISSING)


@pytest.mark.parametrize("task, references", [("t2i", 0), ("t2i", 1), ("edit", 1), ("edit", 2), ("reconstruct", 0)])
def test_rows_have_the_shapes_and_types_of_the_table(golden_root, task, references):
    layout = pixels_layout(fields=OPTIONAL, length=200, max_references=2, latent_shape=(2, 2, 3))
    arrays = {"target_codes": np.arange(16), "target_latent": np.ones((2, 2, 3), np.float16)}
    if references:  # which a t2i row leaves out
        arrays |= {"ref_codes": np.ones((references, 16), int), "ref_latent": np.full((2, 2, 3), 2.0)}
    example = Example(task, "red", picture(1), tuple(picture(2 + n) for n in range(references)), arrays=arrays)
    row = MakeRow(layout, Tokenizer.from_directory(golden_root / "t2i" / "checkpoint"))(example)
    batch = collate([row] * 3, layout)
    for name, field in FIELDS.items():
        assert batch[name].shape == (3, *field.shape(layout)) and batch[name].dtype == field.dtype, name
    count = {"t2i": 0, "reconstruct": 1}.get(task, references)
    assert batch["ref_mask"][0].tolist() == [slot < count for slot in range(2)]
    assert [bool(batch["ref_codes"][0, slot].any()) for slot in range(2)] == [slot < count for slot in range(2)]
    if task == "edit":
        assert number_of(batch["ref_pixels"][0]) == 2, "the first one"
        assert [number_of(pixels) for pixels in batch["ref_tokenizer_pixels"][0, :count]] == [2, 3][:count]
    assert bool(batch["ref_pixels"].any()) == bool(batch["ref_latent"].any()) == (count > 0)
    if task == "reconstruct":
        np.testing.assert_array_equal(batch["ref_pixels"], batch["target_pixels"])
        np.testing.assert_array_equal(batch["ref_tokenizer_pixels"][:, 0], batch["target_tokenizer_pixels"])
        np.testing.assert_array_equal(batch["ref_codes"][:, 0], batch["target_codes"])


def test_the_layout_sets_crop_scale_token_and_loss_mask(golden_root):
    options = dict(crop_before_tokenizing=True, pool_scale=2, loss_on="assistant")
    fields = ("target_pixels", "target_tokenizer_pixels")
    layout = pixels_layout(fields=fields, height=4, width=8, length=200, **options)
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    row = MakeRow(layout, Tokenizer.from_directory(golden_root / "t2i" / "checkpoint"))(Example("t2i", "red", image))
    expected = images.tokenizer_pixels(images.load_image(image), layout.tokenizer_size, (4, 8))
    assert row["target_pixels"].shape == (4, 8, 3)
    np.testing.assert_array_equal(row["target_tokenizer_pixels"], expected)
    sequence = row["sequence"]
    assert sequence.tokens[sequence.window_start] == TOKENS.scale_start + 1
    assert not sequence.loss_mask[: sequence.window_start - 1].any() and sequence.loss_mask[sequence.window_start]


@pytest.mark.parametrize(
    "fields, message",
    [(("ref_codes",), "ref_codes with max_references 0"), (("target_latent",), "latent_shape: missing")],
)
def test_a_layout_has_room_for_its_fields(fields, message):
    with pytest.raises(UserError, match=message):
        pixels_layout(fields=fields)


def test_rows_without_text_have_no_positions():
    layout = pixels_layout(length=200, max_references=2)
    batch = collate([MakeRow(layout, None)(Example("t2i", None, picture(1)))] * 2, layout)
    assert {name: batch[name].shape for name in TEXT_FIELDS} == {
        **dict.fromkeys(("tokens", "loss_mask", "image_slot", "ref_mask"), (2, 0)),
        **dict.fromkeys(("length", "window_start"), (2,)),
    }
