"""The image tokenizer: ids, features of the tower, codebook, decoded features.

The recordings ran TA-Tok's own linear layers and its codebook table before these were rounded to the bfloat16 that the
checkpoint stores; the two transformers ran rounded. So ids are compared exactly, and floats against `ROUNDING`: how
far they are from those of the stored weights in any implementation (largest distance 4e-3, mean 8e-4). Two checks are
sharper than that: the features must follow from a task layer that rounds to the stored one, which leaves no room for
an error of the tower, and what the recording repeats must agree with itself.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.models.siglip import SiglipVision
from blip3o_jax.models.ta_tok import TATok
from blip3o_jax.types import Params

ROUNDING = {"largest": 5e-3, "mean": 1e-3}  # of the largest value
REPEATED = 1e-5


def _run(params: Params, config: Blip3oConfig, method: str, *inputs: Any) -> Any:
    module = TATok(config.image_tokenizer)
    run = jax.jit(lambda params, arrays: module.apply({"params": params}, *arrays, *options, method=method))
    arrays = [value for value in inputs if isinstance(value, np.ndarray)]
    options = [value for value in inputs if not isinstance(value, np.ndarray)]
    return run(params["image_tokenizer"], arrays)


def _pixels(recording: Mapping[str, np.ndarray]) -> np.ndarray:
    return recording["tok_image"].transpose(0, 2, 3, 1)


def _assert_close(got: Any, expected: np.ndarray) -> None:
    assert got.shape == expected.shape
    distance, scale = np.abs(np.asarray(got) - expected), np.abs(expected).max()
    assert distance.max() <= ROUNDING["largest"] * scale
    assert distance.mean() <= ROUNDING["mean"] * scale


def check_indices(recording: Mapping[str, np.ndarray], params: Params, config: Blip3oConfig) -> None:
    """`tok_image` -> `tok_indices`, and at pool scale 2 `tok_indices_pool2`."""
    for pool_scale, key in ((1, "tok_indices"), (2, "tok_indices_pool2")):
        output = _run(params, config, "encode", _pixels(recording), pool_scale)
        np.testing.assert_array_equal(output.indices, recording[key])


def check_features(recording: Mapping[str, np.ndarray], params: Params, config: Blip3oConfig) -> None:
    """`tok_image` -> `tok_siglip_feats`, by a task layer within rounding of the stored one."""
    features, expected = _run(params, config, "features", _pixels(recording)), recording["tok_siglip_feats"]
    _assert_close(features, expected)
    tower = SiglipVision(config.image_tokenizer.encoder)
    states = jax.jit(tower.apply)({"params": params["image_tokenizer"]["encoder"]}, _pixels(recording))
    rows = np.asarray(states, np.float64).reshape(-1, states.shape[-1])
    missing = np.arctanh(expected.astype(np.float64)) - np.arctanh(np.asarray(features, np.float64))
    correction = np.linalg.pinv(rows, rcond=1e-4) @ missing.reshape(rows.shape)
    kernel = np.abs(np.asarray(params["image_tokenizer"]["encode_task"]["kernel"], np.float64))
    step = 2.0 ** (np.floor(np.log2(np.maximum(kernel, 1e-30))) - 7)  # of bfloat16
    assert np.sqrt(np.mean(correction**2)) <= 0.5 * np.sqrt(np.mean(step**2))


def check_codebook(recording: Mapping[str, np.ndarray], params: Params, config: Blip3oConfig) -> None:
    """`tok_codebook`, and `tok_quant` as its rows `tok_indices`."""
    _assert_close(_run(params, config, "codebook"), recording["tok_codebook"])
    quantized = _run(params, config, "encode", _pixels(recording)).quantized
    _assert_close(quantized, recording["tok_quant"])
    rows = recording["tok_codebook"][recording["tok_indices"]]
    np.testing.assert_allclose(recording["tok_quant"], rows, atol=REPEATED * np.abs(rows).max(), rtol=0)
    np.testing.assert_allclose(np.linalg.norm(recording["tok_codebook"], axis=-1), 1, atol=REPEATED)


def check_decoded_features(recording: Mapping[str, np.ndarray], params: Params, config: Blip3oConfig) -> None:
    """`tok_quant` -> `tok_rec_feats`, and the same from `tok_indices` alone."""
    expected = recording["tok_decode_from_indices"]
    _assert_close(_run(params, config, "decode", recording["tok_quant"]), recording["tok_rec_feats"])
    _assert_close(_run(params, config, "decode_from_indices", recording["tok_indices"]), expected)
    atol = REPEATED * np.abs(expected).max()
    np.testing.assert_allclose(recording["tok_rec_feats"], expected, atol=atol, rtol=0)
