"""Reference images of every kind that people hold: what they become, and the one line for what is none."""

import io
import pathlib
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from blip3o_jax.errors import UserError
from blip3o_jax.generate.references import image_of, references_of

RGB = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
GREY = RGB[..., 0]
RGBA = np.concatenate([RGB, np.full((6, 5, 1), 255, np.uint8)], axis=-1)
UNIT = RGB.astype(np.float32) / 255
MASK = GREY > 128


class Tensor:
    """Stands in for torch.Tensor."""

    def __init__(self, array, error=None):
        self.array, self.error = array, error

    ndim = property(lambda self: self.array.ndim)

    def __array__(self, dtype=None, copy=None):
        if self.error:
            raise self.error
        return self.array


Tensor.__module__ = "torch"


def repeated(grey):
    return np.repeat(grey[..., None], 3, axis=-1)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (RGB, RGB),
        (RGBA, RGB),
        (np.concatenate([RGB, np.zeros((6, 5, 1), np.uint8)], axis=-1), np.full_like(RGB, 255)),  # laid on white
        (GREY, repeated(GREY)),
        (GREY[..., None], repeated(GREY)),
        (UNIT, RGB),
        (np.maximum(UNIT - 0.4 / 255, 0), RGB),  # rounded
        (UNIT.astype(np.float64), RGB),
        (UNIT[..., 0], repeated(GREY)),
        (MASK, repeated(np.where(MASK, 255, 0))),
        (jnp.asarray(RGB), RGB),
        (jnp.asarray(UNIT), RGB),
        (RGB[:, ::-1], RGB[:, ::-1]),
        (Tensor(RGB), RGB),
        (Tensor(RGB.transpose(2, 0, 1)), RGB),
        (Tensor(RGB[:3]), RGB[:3]),  # three rows, not three channels
        (Tensor(UNIT.transpose(2, 0, 1)), RGB),
        (Image.fromarray(RGB), RGB),
        (Image.fromarray(GREY), repeated(GREY)),
    ],
)
def test_arrays_become_the_image_they_show(source, expected):
    np.testing.assert_array_equal(np.asarray(image_of(source)), expected)


def test_half_precision_is_read_to_its_own_accuracy():
    got = np.asarray(image_of(jnp.asarray(UNIT, jnp.bfloat16)), int)
    assert np.abs(got - RGB).max() <= 1


def test_files_are_read_from_wherever_they_are(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    for source in (str(tmp_path / "a.png"), pathlib.Path(tmp_path / "a.png"), content, io.BytesIO(content)):
        np.testing.assert_array_equal(np.asarray(image_of(source)), RGB)
    (images,) = references_of(np.array([str(tmp_path / "a.png")] * 2), 1)
    assert [image.size for image in images] == [(5, 6)] * 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((6, 5, 2), np.uint8), r"shape \[6, 5, 2\] - expected \[H W\]"),
        (RGB.transpose(2, 0, 1), "transpose it to channels last"),
        (np.zeros(5, np.uint8), r"shape \[5\]"),
        (np.zeros((0, 5, 3), np.uint8), r"shape \[0, 5, 3\]"),
        (np.zeros((2, 2, 6, 5, 3), np.uint8), r"shape \[2, 2, 6, 5, 3\]"),
        (UNIT * 255, r"floating-point pixels from \S+ to 2\d\d - expected 0 to 1 - scale them"),
        (UNIT * 2 - 1, r"floating-point pixels from -\S+ to 0\.9"),
        (np.where(UNIT > 0.5, np.nan, UNIT), "floating-point pixels from nan to nan"),
        (np.where(UNIT > 0.5, np.inf, UNIT), "to inf"),
        (RGB.astype(np.int64), "pixels of dtype int64"),
        (RGB.astype(np.uint16), "pixels of dtype uint16"),
        (RGB.astype(complex), "pixels of dtype complex128"),
        (RGB.astype(object), "pixels of dtype object"),
        (Tensor(RGB, TypeError("on another device")), r"numpy cannot read \(on another device\)"),
        (3, "got an int - expected a path, a PIL image, an array"),
        ({"image": RGB}, "got a dict"),
        ((x for x in [RGB]), "got a generator"),
        ("no such file.png", "No such file"),
        (b"", "0 bytes, which is empty"),
    ],
)
def test_what_is_no_image_is_told_in_one_line(source, message):
    with pytest.raises(UserError, match=message) as caught:
        references_of(source, 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("image", "count", "expected"),
    [
        (None, 2, [0, 0]),
        ([], 2, [0, 0]),
        (RGB, 2, [1, 1]),
        ([RGB], 1, [1]),
        ([RGB, GREY], 2, [2, 2]),
        (np.stack([RGB, RGB, RGB]), 2, [3, 3]),
        (jnp.stack([RGB, RGB]), 1, [2]),
        ([[RGB], [RGB, GREY]], 2, [1, 2]),
        ([[RGB], None], 2, [1, 0]),
        ([RGB, None], 2, [1, 0]),
        ([[], RGB], 2, [0, 1]),
        ([np.stack([RGB, RGB]), [GREY]], 2, [2, 1]),
    ],
)
def test_lists_are_of_all_prompts_and_lists_of_lists_of_each(image, count, expected):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = references_of(image, count)
    assert [len(own) for own in got] == expected
    paired = expected == [2, 2] and count == 2
    assert [str(one.message) for one in said] == paired * [
        "all 2 images are references of every prompt; for one each, give a list of lists"]  # fmt: skip
    assert all(isinstance(entry, Image.Image) for own in got for entry in own)


@pytest.mark.parametrize(
    ("image", "message"),
    [([[RGB]], "1 lists for 2 prompts"), ([[[RGB]], [RGB]], "one list per prompt"), ([RGB, 3], "got an int")],
)
def test_lists_that_do_not_fit_the_prompts_are_refused(image, message):
    with pytest.raises(UserError, match=message):
        references_of(image, 2)
