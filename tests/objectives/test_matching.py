"""DiffusionNFT and advantage weighted matching against their formulas in float64, and what they leave alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax import masked
from blip3o_jax.config import EditConfig
from blip3o_jax.config.presets import preset
from blip3o_jax.generate import matching as points
from blip3o_jax.models import blip3o
from blip3o_jax.objectives import matching
from blip3o_jax.types import MatchingRollout
from support.small import jit, params_of

RNG = np.random.default_rng(0)
B, K, SHAPE = 3, 2, (4, 5, 6)
ADVANTAGE = np.array([2.0, -5.0, 9.0], np.float32)


@pytest.fixture
def batch():
    draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)  # noqa: E731
    return MatchingRollout(
        states=None, latent=draw(B, *SHAPE), noise=draw(B, K, *SHAPE), level=RNG.random((B, K), np.float32),
        old_velocity=draw(B, K, *SHAPE), ref_velocity=draw(B, K, *SHAPE), mask=np.array([True, True, False]),
        advantage=ADVANTAGE, kl_scale=np.array([1, 2, 1], np.float32),
    )  # fmt: skip


@pytest.fixture
def loss(monkeypatch):
    """Loss of a batch by a method whose parameters are the velocity itself."""

    def value(method, settings, batch, velocity):
        monkeypatch.setattr(points, "velocities", lambda model, params, *rest: params)
        terms, metrics = getattr(matching, method)(MODEL, settings)(velocity, batch, None)
        return sum(term.coefficient * term.sum / term.weight for term in terms.values()), metrics

    return value


class MODEL:
    """All that is read of a model's configuration."""

    class schedule:
        num_train_timesteps, shift = 1000, 3.0


def wide(batch):
    """Data, target and noise levels in float64."""
    count = MODEL.schedule.num_train_timesteps
    sigma = 1 - np.floor(batch.level.astype(np.float64) * count) / count
    sigma = 3 * sigma / (1 + 2 * sigma)
    data, noise = batch.latent.astype(np.float64)[:, None], batch.noise.astype(np.float64)
    sigma = sigma[:, :, None, None, None]
    return data, noise - data, sigma, (1 - sigma) * data + sigma * noise


@pytest.mark.parametrize("nft_beta", [1.0, 0.3])
def test_nft_is_its_formula(batch, loss, nft_beta):
    velocity = batch.old_velocity + 0.1 * batch.noise
    got, metrics = loss("nft", matching.NftSettings(nft_beta=nft_beta, advantage_range=4.0, beta=0.5), batch, velocity)
    data, target, sigma, x = wide(batch)
    share = np.array([0.75, 0.0])[:, None]  # 0.5 + advantage / 8 of the rows that count, at least 0

    def error(v):
        away = (x - sigma * v - data)[:2]
        return (away**2).mean(axis=(2, 3, 4)) / np.abs(away).mean(axis=(2, 3, 4))

    towards = (1 - nft_beta) * batch.old_velocity.astype(float) + nft_beta * velocity
    against = (1 + nft_beta) * batch.old_velocity.astype(float) - nft_beta * velocity
    policy = (share * error(towards) + (1 - share) * error(against)).mean() * 4 / nft_beta
    distance = np.square(velocity - batch.ref_velocity).mean(axis=(2, 3, 4))[:2] * np.array([1, 2])[:, None]
    assert float(got) == pytest.approx(policy + 0.5 * distance.mean(), rel=1e-5)
    moved, error = (np.square(x[:2]).mean() for x in (0.1 * batch.noise, velocity - target))
    assert masked.averages(metrics) == pytest.approx(
        {"moved": moved, "matching_error": error, "kl": np.square(velocity - batch.ref_velocity)[:2].mean()}, rel=1e-4
    )


def test_awm_is_its_formula(batch, loss):
    velocity = batch.old_velocity + 0.01 * batch.noise
    got, metrics = loss("awm", matching.AwmSettings(clip=0.01, beta=0.0), batch, velocity)
    _, target, _, _ = wide(batch)
    new, old = (-np.square(v - target).mean(axis=(2, 3, 4)) for v in (velocity, batch.old_velocity.astype(float)))
    ratio, weight = np.exp(new - old)[:2], ADVANTAGE[:2, None].astype(float)
    expected = -np.minimum(ratio * weight, np.clip(ratio, 0.99, 1.01) * weight).mean()
    assert float(got) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["clip_fraction"][0]) > 0
    assert masked.averages(metrics)["matching_error"] == pytest.approx(-new[:2].mean(), rel=1e-5)


def test_an_image_that_is_predicted_exactly_has_no_error(batch):
    made = points.noised(MODEL, batch.latent, batch.noise, batch.level)
    np.testing.assert_array_equal(matching.image_error(made, made.target), 0)


@pytest.mark.parametrize(("method", "settings"), [("nft", matching.NftSettings()), ("awm", matching.AwmSettings())])
def test_good_images_draw_the_velocity_and_bad_ones_push_it_away(batch, loss, method, settings):
    batch = batch.replace(ref_velocity=batch.old_velocity)
    gradient = jax.grad(lambda v: loss(method, settings, batch, v)[0])(jnp.asarray(batch.old_velocity))
    towards = (gradient * (batch.old_velocity - wide(batch)[1])).sum(axis=(2, 3, 4))
    assert (towards[0] > 0).all() and (towards[1] < 0).all()  # descent goes to the target, and away from it
    np.testing.assert_array_equal(gradient[2], 0)  # masked


def test_every_level_has_the_velocity_at_its_own_noise_beside_the_reference_of_its_row():
    model = dataclasses.replace(preset("tiny"), edit=EditConfig(vae_condition=True, vae_noise=True))
    make, shape = blip3o.initializers(model), (2, 2, model.autoencoder.latent_channels)
    params = {part: params_of(make[part]) for part in ("dit", "connector", "vae_connector")}
    params["vae_connector"] = jax.tree.map(lambda leaf: leaf + 0.1, params["vae_connector"])  # biases are not zero
    draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)  # noqa: E731
    hidden, reference, has_ref = (
        draw(2, 1 + model.num_image_tokens, model.decoder.width),
        draw(2, *shape),
        [True, False],
    )
    made = points.noised(model, draw(2, *shape), draw(2, K, *shape), np.array([[0.1, 0.8], [0.4, 0.6]], np.float32))
    got = points.velocities(model, params, hidden, reference, np.array(has_ref), made)
    own = np.where(np.array(has_ref)[:, None, None, None], reference, 0)
    condition = np.array(blip3o.make_condition(model, params, hidden, own))
    condition[1, 1 + model.num_image_tokens :] = 0
    single = jit(lambda x, sigma: blip3o.velocity(model, params, x, sigma, condition, own))
    for level in range(K):
        expected = single(made.x[:, level], made.sigma[:, level])
        np.testing.assert_allclose(got[:, level], expected, atol=1e-4)
    assert np.abs(got[:, 0] - got[:, 1]).max() > 1e-2


def test_draws_belong_to_the_image_and_spread_over_the_levels():
    keys, latent = jax.random.split(jax.random.key(0), 4), jnp.zeros((4, *SHAPE))
    noise, level = points.draw(latent, keys, 4)
    np.testing.assert_allclose(np.diff(np.sort(level, axis=1), axis=1), 0.25, rtol=1e-5)
    assert level.min() >= 0 and level.max() < 1
    alone, _ = points.draw(latent[2:3], keys[2:3], 4)
    np.testing.assert_array_equal(alone[0], noise[2])
    assert len(np.unique(np.asarray(noise[:, :, 0, 0, 0]))) == 16
