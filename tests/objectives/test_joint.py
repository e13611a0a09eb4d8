"""The joint objective's noise: what is drawn for a row, and several levels for one picture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.errors import UserError
from blip3o_jax.models import blip3o
from blip3o_jax.objectives import joint
from blip3o_jax.presets import preset

MODEL = preset("tiny")
SHAPE = (2, 3, MODEL.dit.in_channels)
KEYS = jax.random.split(jax.random.key(0), 4)


def test_the_first_draw_is_that_of_a_single_one_and_the_others_are_new():
    one, three = (joint.draw_flow(KEYS, SHAPE, 0.5, draws) for draws in (1, 3))
    assert three.u.shape == (12,) and three.noise.shape == (12, *SHAPE) and three.drop.shape == (4,)
    np.testing.assert_array_equal(three.u[:4], one.u)
    np.testing.assert_array_equal(three.noise[:4], one.noise)
    np.testing.assert_array_equal(three.drop, one.drop)
    assert len(np.unique(np.asarray(three.noise[:, 0, 0, 0]))) == 12


def test_the_levels_of_a_row_are_spread_evenly():
    levels = np.sort(joint.draw_flow(KEYS, SHAPE, 0.5, 4).u.reshape(4, 4), axis=0)
    assert levels.min() >= 0 and levels.max() < 1
    np.testing.assert_allclose(np.diff(levels, axis=0), 0.25, rtol=1e-5)


def test_rows_draw_the_same_whichever_rows_are_beside_them():
    whole, part = (joint.draw_flow(keys, SHAPE, 0.5, 2) for keys in (KEYS, KEYS[2:]))
    np.testing.assert_array_equal(whole.noise.reshape(2, 4, *SHAPE)[:, 2:], part.noise.reshape(2, 2, *SHAPE))
    np.testing.assert_array_equal(whole.drop[2:], part.drop)


def test_several_draws_give_the_mean_of_their_errors():
    params = blip3o.init(MODEL, jax.random.key(1))
    condition = jax.random.normal(jax.random.key(2), (4, 5, MODEL.dit.caption_channels))
    latent = jax.random.normal(jax.random.key(3), (4, *SHAPE))

    @jax.jit
    def errors(params, draw):
        return joint.velocity_errors(MODEL, params, condition, latent, None, draw)

    draw = joint.draw_flow(KEYS, SHAPE, 0.0, 3)
    rows = [slice(first, first + 4) for first in (0, 4, 8)]
    single = [errors(params, joint.FlowDraw(draw.u[part], draw.noise[part], draw.drop)) for part in rows]
    assert np.ptp(np.stack(single), axis=0).min() > 0
    np.testing.assert_allclose(errors(params, draw), jnp.stack(single).mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"flow_draws": 0}, "objective.flow_draws: got 0"),
        ({"condition_dropout": 1.5}, "objective.condition_dropout: got 1.5"),
        ({"window": "head"}, "objective.window: got 'head'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(values, message):
    with pytest.raises(UserError, match=message):
        joint.Settings(**values)
