"""Where the pixels of a token lie."""

import flax.linen as nn
import jax
import numpy as np

from blip3o_jax.models.pixel_head import PixelHead


def test_a_token_is_one_patch_at_its_place():
    model, features = PixelHead(patch_size=3, hidden=8), np.random.default_rng(0).normal(size=(1, 16, 5))
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), features))
    other = features.copy()
    other[0, 6] += 1  # second row, third column
    changed = np.any(model.apply(params, other) != model.apply(params, features), axis=(0, 3))
    assert changed.shape == (12, 12) and changed[3:6, 6:9].all() and changed.sum() == 9
    params = jax.tree.map(np.zeros_like, params)
    params["params"]["mlp"]["out"]["bias"] = np.arange(27.0)  # row by row, channels last
    np.testing.assert_array_equal(model.apply(params, features)[0, :3, :3], np.arange(27).reshape(3, 3, 3))
