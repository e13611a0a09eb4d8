"""Norms of bfloat16 vectors: float32 statistics, epsilons, and where they round."""

import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.nn.norm import LayerNorm, RMSNorm, layer_normalize, rms_normalize

X = jnp.asarray(np.random.default_rng(0).normal(3.0, 1.0, (200, 64)), jnp.bfloat16)
EXACT = np.asarray(X, np.float64)
SCALE, BIAS = (np.random.default_rng(seed).normal(size=64).astype(np.float32) for seed in (1, 2))
RMS = EXACT / np.sqrt(np.square(EXACT).mean(axis=1, keepdims=True) + 0.5)
NORMAL = (EXACT - EXACT.mean(axis=1, keepdims=True)) / np.sqrt(EXACT.var(axis=1, keepdims=True) + 0.5)


@pytest.mark.parametrize(("function", "exact"), [(rms_normalize, RMS), (layer_normalize, NORMAL)])
def test_statistics_are_those_of_float64(function, exact):
    got = function(X, 0.5)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_norm_rounds_once_and_an_rms_norm_before_its_scale(dtype):
    dtype = jnp.dtype(dtype)
    layer = LayerNorm(0.5, dtype=dtype).apply({"params": {"scale": SCALE, "bias": BIAS}}, X)
    rms = RMSNorm(0.5, dtype=dtype).apply({"params": {"scale": SCALE}}, X)
    expected = (NORMAL * SCALE + BIAS).astype(dtype), RMS.astype(dtype) * SCALE.astype(dtype)
    for got, exact in zip((layer, rms), expected, strict=True):
        assert got.dtype == dtype
        wrong = ~np.isclose(got.astype(jnp.float32), exact.astype(np.float32), rtol=1e-5, atol=1e-5)
        assert wrong.mean() < 0.005
