"""Rotary embedding against float64."""

import jax.numpy as jnp
import numpy as np

from blip3o_jax.nn.rope import apply_rope, rope_table


def test_pairs_of_a_half_each_turn_by_their_position_over_their_wavelength():
    positions = np.array([[0, 1, 301, 5001]])
    x = np.random.default_rng(0).normal(size=(1, 4, 2, 8)).astype(np.float32)
    turn = np.exp(1j * positions[0, :, None, None] / 1e4 ** (np.arange(4) / 4))
    turned = (x[..., :4] + 1j * x[..., 4:].astype(np.float64)) * turn
    got = apply_rope(x, *rope_table(jnp.asarray(positions), 8, 1e4))
    np.testing.assert_allclose(got, np.concatenate([turned.real, turned.imag], axis=-1), atol=2e-3)
