"""The autoencoder: latents of a picture, and the picture decoded from the recorded latents.

The recordings come from weights as they were before they were rounded to bfloat16 for the checkpoint (docs/parity.md):
diffusers on the stored weights is as far from them, and within 1e-5 of this package (tests/parity). So they are
compared at the accuracy of that rounding.
"""

from collections.abc import Mapping

import jax
import numpy as np

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.models.dc_ae import DCAE
from blip3o_jax.types import Params

LARGEST, MEAN = 5e-3, 1e-3  # of the largest value


def _run(params: Params, config: Blip3oConfig, method: str, x: np.ndarray) -> np.ndarray:
    """Applies a method to an array in torch's layout and returns one."""
    run = jax.jit(lambda params, x: DCAE(config.autoencoder).apply({"params": params}, x, method=method))
    return np.asarray(run(params["autoencoder"], x.transpose(0, 2, 3, 1))).transpose(0, 3, 1, 2)


def _assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    difference, scale = np.abs(got - expected), np.abs(expected).max()
    assert difference.max() <= LARGEST * scale
    assert difference.mean() <= MEAN * scale


def check_latents(recording: Mapping[str, np.ndarray], params: Params, config: Blip3oConfig) -> None:
    """`vae_image` -> `vae_latent`."""
    _assert_close(_run(params, config, "encode", recording["vae_image"]), recording["vae_latent"])


def check_decoded_picture(recording: Mapping[str, np.ndarray], params: Params, config: Blip3oConfig) -> None:
    """`vae_latent` -> `vae_decoded`."""
    _assert_close(_run(params, config, "decode", recording["vae_latent"]), recording["vae_decoded"])
