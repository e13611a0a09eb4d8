"""The joint objective's noise: what is drawn for a row, and several levels for one picture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.config.presets import preset
from blip3o_jax.errors import UserError
from blip3o_jax.models import blip3o
from blip3o_jax.objectives import joint
from blip3o_jax.types import Batch
from support.small import jit, params_of

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


def test_random_streams_of_a_row_are_independent():
    draw = joint.draw_flow(jax.random.split(jax.random.key(0), 2000), (1, 1, 1), 0.1, 2)
    assert abs(draw.drop.mean() - 0.1) < 0.03
    first, second = draw.noise.reshape(2, 2000)
    assert abs(np.corrcoef(draw.drop, second)[0, 1]) < 0.1
    key = jax.random.key(0)
    split = jax.random.key_data(jax.random.split(key, 3))
    streams = joint.CODES_STREAM, joint.CHOICE_STREAM, *range(joint.NOISE_STREAMS, joint.NOISE_STREAMS + 4)
    assert len(set(streams)) == len(streams)
    for stream in streams:
        own = jax.random.key_data(jax.random.fold_in(key, stream))
        assert not (own == split).all(axis=1).any(), stream


def test_rows_draw_the_same_whichever_rows_are_beside_them():
    whole, part = (joint.draw_flow(keys, SHAPE, 0.5, 2) for keys in (KEYS, KEYS[2:]))
    np.testing.assert_array_equal(whole.noise.reshape(2, 4, *SHAPE)[:, 2:], part.noise.reshape(2, 2, *SHAPE))
    np.testing.assert_array_equal(whole.drop[2:], part.drop)


def test_several_draws_give_the_mean_of_their_errors_and_dropped_rows_do_not_see_their_states():
    params = blip3o.init(MODEL, jax.random.key(1))
    states = jax.random.normal(jax.random.key(2), (4, 1 + MODEL.num_image_tokens, MODEL.decoder.width))
    latent = jax.random.normal(jax.random.key(3), (4, *SHAPE))

    @jax.jit
    def errors(params, draw, states=states):
        return joint.flow_errors(MODEL, params, states, latent, None, None, draw)

    draw = joint.draw_flow(KEYS, SHAPE, 0.0, 3)
    rows = [slice(first, first + 4) for first in (0, 4, 8)]
    single = [errors(params, joint.FlowDraw(draw.u[part], draw.noise[part], draw.drop)) for part in rows]
    assert np.ptp(np.stack(single), axis=0).min() > 0
    np.testing.assert_allclose(errors(params, draw), jnp.stack(single).mean(axis=0), rtol=1e-5)
    dropped = draw.replace(drop=np.array([True, False, False, True]))
    seen = errors(params, dropped) != errors(params, dropped, 1 - states)
    np.testing.assert_array_equal(seen, [False, True, True, False])


def test_one_row_of_every_group_is_drawn_evenly_and_whole():
    keys = jax.random.split(jax.random.key(1), 600)
    rows = {"number": jnp.arange(600), "keys": keys, "nothing": jnp.zeros((600, 0, 2))}
    chosen = jax.jit(joint.one_of_every, static_argnums=0)(3, keys, rows)
    place = chosen["number"] - 3 * jnp.arange(200)
    assert chosen["nothing"].shape == (200, 0, 2)
    assert np.bincount(place, minlength=3).min() > 40 and place.min() >= 0 and place.max() <= 2
    assert (jax.random.key_data(chosen["keys"]) == jax.random.key_data(keys[chosen["number"]])).all()


def test_the_flow_half_of_one_row_in_two_leaves_the_cross_entropy_alone():
    codes, latent, start = MODEL.num_image_tokens, MODEL.latent_size, 3
    rng = np.random.default_rng(0)
    slot = np.full((2, start + codes + 2), -1, np.int32)
    slot[:, start + 1 : start + 1 + codes] = np.arange(codes)
    batch = Batch(
        tokens=rng.integers(0, 300, slot.shape).astype(np.int32),
        length=np.full(2, slot.shape[1], np.int32),
        loss_mask=(slot >= 0) | (np.arange(slot.shape[1]) == 0),  # nothing predicts the first token
        image_slot=slot,
        window_start=np.full(2, start, np.int32),
        ref_mask=np.zeros((2, 0), bool),
        target_codes=rng.integers(0, 64, (2, codes)).astype(np.int32),
        target_latent=rng.normal(size=(2, latent, latent, MODEL.dit.in_channels)).astype(np.float32),
    )
    params = params_of(lambda key: blip3o.init(MODEL, key))
    settings = [joint.Settings(ce_weight=0.5, flow_weight=2.0, flow_every=every) for every in (1, 2)]
    whole, half = (jit(joint.make(MODEL, own)) for own in settings)
    (all_terms, metrics), (terms, _) = (loss(params, batch, KEYS[:2]) for loss in (whole, half))
    assert (terms["ce"].coefficient, terms["flow"].coefficient) == (0.5, 2.0)
    assert terms["ce"].weight == metrics["accuracy"][1] == 2 * codes
    assert (metrics["images"][0], metrics["tokens"][0]) == (2, slot.size)
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], (batch, KEYS[:2])) for i in range(2)]
    singles = [whole(params, *row)[0] for row in rows]
    np.testing.assert_allclose(terms["ce"].sum, all_terms["ce"].sum, rtol=1e-6)
    chosen = int(joint.one_of_every(2, KEYS[:2], jnp.arange(2))[0])
    assert terms["flow"].weight == 1 and all_terms["flow"].weight == 2
    np.testing.assert_allclose(terms["flow"].sum, singles[chosen]["flow"].sum, rtol=1e-5)
    assert abs(singles[0]["flow"].sum / singles[1]["flow"].sum - 1) > 1e-3


@pytest.mark.parametrize(("rows", "groups"), [(4, 2), (2, 1)])
def test_the_first_rows_fill_the_last_group_up(rows, groups):
    chosen = [joint.one_of_every(3, jax.random.split(jax.random.key(i), rows), jnp.arange(rows)) for i in range(40)]
    assert np.shape(chosen) == (40, groups)
    assert set(np.stack(chosen)[:, -1].tolist()) == ({3, 0, 1} if rows == 4 else {0, 1})


def test_rows_without_room_for_an_image_are_refused():
    batch = Batch(
        **dict.fromkeys(("length", "loss_mask", "image_slot", "window_start", "ref_mask")), tokens=np.zeros((4, 0))
    )
    with pytest.raises(UserError, match="^row.length: got 0 - expected more than the"):
        joint.read(MODEL, {}, batch, None, None)


def test_encoders_that_take_one_row_at_a_time_give_the_same_codes_and_latents():
    side, height = MODEL.image_tokenizer.image_size, MODEL.image_size
    rng = np.random.default_rng(1)
    batch = Batch(
        tokens=np.zeros((4, 2), np.int32),
        length=np.full(4, 2, np.int32),
        loss_mask=np.zeros((4, 2), bool),
        image_slot=np.full((4, 2), -1, np.int32),
        window_start=np.zeros(4, np.int32),
        ref_mask=np.zeros((4, 0), bool),
        target_tokenizer_pixels=rng.uniform(-1, 1, (4, side, side, 3)).astype(np.float32),
        target_pixels=rng.uniform(-1, 1, (4, height, height, 3)).astype(np.float32),
    )
    params = params_of(lambda key: blip3o.init(MODEL, key))
    codes = [jit(lambda p, b, n=n: joint.encode_codes(MODEL, p, b, KEYS[:4], n)[0])(params, batch) for n in (0, 1)]
    latents = [jit(lambda p, b, n=n: joint.encode_latents(MODEL, p, b, n)[0])(params, batch) for n in (0, 1)]
    np.testing.assert_array_equal(*codes)
    np.testing.assert_allclose(*latents, rtol=1e-5, atol=1e-5)
    assert len(np.unique(codes[0])) > 1
    nearest = jit(lambda p, b: joint.encode_codes(MODEL, p, b)[0])(params, batch)
    assert (nearest != codes[0]).any()  # which were drawn
    total = lambda part: joint.encode_latents(MODEL, {**params, "autoencoder": part}, batch)[0].sum()  # noqa: E731
    assert not any(map(np.any, jax.tree.leaves(jit(jax.grad(total))(params["autoencoder"]))))  # is held constant


def test_rows_without_a_reference_have_a_latent_of_zeros():
    draw = np.random.default_rng(0).normal(size=(2, 2, *SHAPE)).astype(np.float32)
    batch = Batch(*[None] * 5, ref_mask=np.array([[True], [False]]), target_latent=draw[0], ref_latent=draw[1])
    latent, reference, present = joint.encode_latents(preset("tiny-edit"), {}, batch)
    np.testing.assert_array_equal(latent, draw[0])
    np.testing.assert_array_equal(reference, np.stack([draw[1, 0], 0 * draw[1, 1]]))
    np.testing.assert_array_equal(present, [True, False])
