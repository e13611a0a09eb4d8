"""Masked sums and the algebra of metrics."""

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax import masked

VALUES = jnp.array([[1.0, 2.0, np.nan], [4.0, 5.0, 6.0]])
MASK = jnp.array([[True, True, False], [False, True, False]])


def test_masked_out_values_do_not_count_even_if_not_finite():
    assert float(masked.masked_sum(VALUES, MASK)) == 8
    np.testing.assert_allclose(masked.masked_mean(VALUES, MASK, axis=1), [1.5, 5])
    assert float(masked.masked_mean(VALUES, jnp.zeros((2, 3), bool))) == 0


def test_sums_of_bfloat16_are_in_float32():
    assert float(masked.masked_sum(jnp.ones(257, jnp.bfloat16), jnp.ones(257, bool))) == 257


def test_masks_broadcast_from_the_left():
    np.testing.assert_allclose(masked.masked_mean(VALUES, jnp.array([False, True])), 5)
    total, weight = masked.metric(VALUES, jnp.array([False, True]))
    assert (float(total), float(weight)) == (15, 3)


def test_uneven_parts_average_like_the_whole():
    values = jnp.arange(10.0)
    whole = masked.averages({"x": masked.metric(values)})
    first, second = ({"x": masked.metric(part)} for part in (values[:3], values[3:]))
    parts = masked.add_metrics(first | {"y": (2.0, 4.0)}, second | {"z": (1.0, 4.0)})
    assert masked.averages(parts) == {**whole, "y": 0.5, "z": 0.25}
    assert masked.averages({"x": (0.0, 0.0)}) == {}


def test_ratio_has_a_finite_gradient_at_weight_zero():
    assert float(jax.grad(masked.ratio)(0.0, 0.0)) == 0
