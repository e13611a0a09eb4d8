"""Cells of contact sheets."""

import numpy as np

from blip3o_jax.evals.sheet import captioned

IMAGE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def test_images_stand_side_by_side_and_small_ones_are_not_smoothed():
    sheet = captioned([IMAGE, 255 - IMAGE], "words", side=64)
    for left, image in ((8, IMAGE), (208, 255 - IMAGE)):
        np.testing.assert_array_equal(sheet[8 : 8 + 192, left : left + 192], image.repeat(24, 0).repeat(24, 1))
    large = np.zeros((128, 128, 3), np.uint8)
    large[:, 1::2] = 255
    np.testing.assert_array_equal(captioned([large], "")[20, 8:200:3], captioned([large], "")[60, 8:200:3])
    assert captioned([large], "").std() > captioned([large], "", side=64).std(), "detail beyond `side` is lost"
