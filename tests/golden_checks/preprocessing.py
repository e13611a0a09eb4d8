"""What happens to pictures before the image tokenizer."""

from collections.abc import Mapping

import numpy as np
from PIL import Image

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.data import images
from blip3o_jax.types import Params


def check_tokenizer_pixels(recording: Mapping[str, np.ndarray], params: Params, config: Blip3oConfig) -> None:
    """`pre_*_uint8` -> `pre_*_siglip`."""
    for shape in ("wide", "tall"):
        picture = Image.fromarray(recording[f"pre_{shape}_uint8"])
        got = images.tokenizer_pixels(picture, config.image_tokenizer.image_size)
        difference = np.abs(got - recording[f"pre_{shape}_siglip"].transpose(1, 2, 0)) / 2  # on [0, 1]
        assert difference.max() <= 1 / 255
        assert difference.mean() <= 1e-3
