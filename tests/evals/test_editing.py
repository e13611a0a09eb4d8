"""Similarity of an edit to its reference: the part that changed least, written out block by block."""

import math

import numpy as np
import pytest

from blip3o_jax.data.images import ssim_map
from blip3o_jax.evals import editing


@pytest.mark.parametrize("psnr, kept", [(5.0, 0), (10.0, 0), (20.0, 0.5), (30.0, 1), (60.0, 1), (math.nan, 1)])
def test_kept_grows_with_the_psnr_of_the_untouched_region(psnr, kept):
    assert editing.EditScore("recolor", True, psnr, 1.0).kept == kept


@pytest.mark.parametrize("share", [0.3, 0.75, 1.0])
def test_the_part_that_changed_least_is_that_of_the_best_blocks_and_windows(share):
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 256, (41, 101, 3), dtype=np.uint8)  # blocks of 2 x 2, cut off at two sides
    noise = rng.normal(0, np.linspace(1, 40, 101)[:, None], reference.shape)
    image = (reference + noise).clip(0, 255).astype(np.uint8)
    squares = (image.astype(float) - reference) ** 2
    blocks = [squares[y : y + 2, x : x + 2].reshape(-1, 3) for y in range(0, 41, 2) for x in range(0, 101, 2)]
    blocks = sorted(blocks, key=np.mean)[: math.ceil(share * len(blocks))]
    windows = sorted(ssim_map(image, reference).mean(-1).ravel(), reverse=True)
    windows = windows[: math.ceil(share * len(windows))]
    expected = 10 * math.log10(255**2 / np.concatenate(blocks).mean()), np.mean(windows)
    np.testing.assert_allclose(editing.least_changed(reference, image, share), expected, rtol=1e-9)


def test_an_unchanged_image_has_the_highest_scores():
    image = np.full((16, 16, 3), 7, np.uint8)
    assert editing.least_changed(image, image, 0.5) == (editing.PSNR_CEILING, 1.0)
