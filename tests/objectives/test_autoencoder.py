"""The autoencoder's objective: distances, descent, and an adversarial game in one backward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from blip3o_jax import masked
from blip3o_jax.config import DCAEConfig, schema
from blip3o_jax.config.presets import preset
from blip3o_jax.errors import UserError
from blip3o_jax.models import blip3o
from blip3o_jax.models.dc_ae import DCAE
from blip3o_jax.models.discriminator import Discriminator, DiscriminatorConfig, smallest_side
from blip3o_jax.objectives import autoencoder, pixel_losses
from blip3o_jax.train.step import make_evaluation
from support.small import image_batch, jit, params_of, train

MODEL = dataclasses.replace(
    preset("tiny"),
    dit=dataclasses.replace(preset("tiny").dit, in_channels=8, out_channels=8),
    autoencoder=DCAEConfig(
        encoder_channels=(8, 16),
        encoder_layers=(1, 1),
        encoder_blocks=("ResBlock",) * 2,
        encoder_multiscales=((),) * 2,
        decoder_channels=(8, 16),
        decoder_layers=(1, 1),
        decoder_blocks=("ResBlock",) * 2,
        decoder_multiscales=((),) * 2,
        head_dim=8,
        latent_channels=8,
        scaling_factor=0.5,
    ),
)
GAME = {"adversarial": {"weight": 0.1, "start_step": 3, "discriminator": {"width": 8, "depth": 2}}}


def smooth_pictures(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Discs of random colours on random backgrounds, in [-1, 1]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    centre, radius = rng.uniform(0.3, 0.7, (2, count, 1, 1)) * side, side * 0.25
    inside = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
    front, back = rng.uniform(-0.9, 0.9, (2, count, 1, 1, 3))
    return np.where(inside[..., None], front, back).astype(np.float32)


@functools.cache
def loss_of(**values):
    """The loss function; one per settings, so that its programs are compiled once."""
    return autoencoder.make(MODEL, schema.from_dict(autoencoder.Settings, values))


GAME_SETTINGS = schema.from_dict(autoencoder.Settings, GAME)
GAME_LOSS = autoencoder.make(MODEL, GAME_SETTINGS)


@functools.cache
def start():
    extra = autoencoder.extra_modules(MODEL, GAME_SETTINGS)
    pixels = jnp.zeros((1, MODEL.image_size, MODEL.image_size, 3))

    def make(key):
        model = DCAE(MODEL.autoencoder).init(key, pixels, method="init_all")["params"]
        return {"autoencoder": model, **{name: init(key) for name, init in extra.items()}}

    return params_of(make)


PIXELS = smooth_pictures(4, MODEL.image_size)
BATCH = image_batch(target_pixels=PIXELS)


def moved(before, after) -> float:
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, before, after)))


def test_the_loss_of_a_small_batch_falls():
    history, _ = train(loss_of(laplacian_weight=1.0), {"autoencoder": start()["autoencoder"]}, BATCH, 25)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["loss_laplacian"] < 0.8 * history[0]["loss_laplacian"]
    assert history[-1]["psnr"] > history[0]["psnr"] + 4
    assert history[0]["latent_square"] > 0


def test_noise_on_latents_is_for_training_only_and_their_size_is_held_near_one():
    loss, params = loss_of(latent_noise=0.7, unit_weight=0.02), {"autoencoder": start()["autoencoder"]}
    keys = jax.random.split(jax.random.key(0), 4)

    def values(loss, keys=keys):
        terms, metrics = jit(loss)(params, BATCH, keys)
        return float(terms["pixel"].sum), terms, metrics

    noisy, terms, metrics = values(loss.at(jnp.int32(0), keys[0]))
    quiet, plain = values(loss.held_out)[0], values(loss_of().held_out)[0]
    assert quiet == plain and abs(noisy - quiet) > 1e-3 * quiet
    assert values(loss.at(jnp.int32(0), keys[0]), jax.random.split(jax.random.key(1), 4))[0] != noisy
    latent = DCAE(MODEL.autoencoder).apply({"params": params["autoencoder"]}, PIXELS, method="encode")
    square = np.square(np.asarray(latent) * MODEL.autoencoder.scaling_factor).mean((1, 2, 3))
    np.testing.assert_allclose(metrics["latent_square"][0] / 4, square.mean(), rtol=1e-4)
    np.testing.assert_allclose(terms["unit"].sum, np.square(square - 1).sum(), rtol=1e-4)
    assert terms["unit"].coefficient == 0.02


def test_terms_and_metrics_are_of_what_is_decoded(monkeypatch):
    monkeypatch.setattr(blip3o, "encode_latent", lambda model, params, pixels: 3 * jnp.ones_like(pixels))
    monkeypatch.setattr(blip3o, "decode_latent", lambda model, params, latent: latent)
    batch = image_batch(target_pixels=np.full((4, 32, 32, 3), 0.8, np.float32))
    loss = loss_of(distance="l2", latent_noise=2.0, laplacian_weight=0.7, unit_weight=0.2)
    terms, metrics = loss.held_out({}, batch, jax.random.split(jax.random.key(0), 4))
    assert {name: term.coefficient for name, term in terms.items()} == {"pixel": 1.0, "laplacian": 0.7, "unit": 0.2}
    values = {name: float(term.sum / term.weight) for name, term in terms.items()}
    assert values == pytest.approx({"pixel": 2.2**2, "laplacian": 2.2 / 4, "unit": 8.0**2}, rel=1e-5)
    expected = {"psnr": 20.0, "images": 4.0, "latent_square": 9.0}  # decibels of pixels clipped to 1
    assert masked.averages(metrics) == pytest.approx(expected, rel=1e-5)
    terms, metrics = loss.at(jnp.int32(0), None)({}, batch, jax.random.split(jax.random.key(0), 4))
    assert float(terms["pixel"].sum / 4) == pytest.approx(2.2**2 + 2.0**2, rel=0.05)
    assert masked.averages(metrics)["latent_square"] == pytest.approx(9.0)  # without the noise


def test_the_game_starts_at_its_step_and_not_before():
    before = start()
    history, after = train(GAME_LOSS, before, BATCH, 3)
    assert all(metrics["loss_generator"] is None and metrics["score_made"] is None for metrics in history)
    assert moved(before["discriminator"], after["discriminator"]) == 0
    assert moved(before["autoencoder"], after["autoencoder"]) > 0
    history, after = train(GAME_LOSS, before, BATCH, 12)
    assert moved(before["discriminator"], after["discriminator"]) > 0
    assert history[2]["loss_discriminator"] is None and history[3]["loss_discriminator"] is not None
    assert history[-1]["loss_discriminator"] < history[3]["loss_discriminator"]
    assert history[-1]["score_real"] > history[-1]["score_made"]


def test_accumulated_games_are_those_of_the_big_batch():
    whole, parts = (train(GAME_LOSS, start(), BATCH, 5, accumulation=count)[0] for count in (1, 2))
    for left, right in zip(whole, parts, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4)


def test_one_backward_pass_gives_each_side_its_own_gradient():
    module = Discriminator(DiscriminatorConfig(width=8, depth=2))
    params = start()["discriminator"]
    real, made = (smooth_pictures(3, 16, seed) for seed in (0, 1))

    def game(params, made):
        generator, discriminator, *_ = autoencoder.adversarial_sums(module, params, real, made)
        return 0.1 * generator + discriminator

    def scores(params, pixels):
        return module.apply({"params": params}, pixels)

    def discriminator_alone(params):
        on_real, on_made = scores(params, real), scores(params, made)
        hinges = jnp.maximum(0, 1 - on_real), jnp.maximum(0, 1 + on_made)
        return sum(0.5 * x.mean((1, 2)).sum() for x in hinges)

    def generator_alone(made):
        return -0.1 * scores(params, made).mean((1, 2)).sum()

    got = jit(jax.grad(game, (0, 1)))(params, made)
    expected = jit(jax.grad(discriminator_alone))(params), jit(jax.grad(generator_alone))(made)
    for left, right in zip(got, expected, strict=True):
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(right))
        assert largest > 0
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5 * largest), left, right)


def test_held_out_batches_are_judged_whatever_the_step():
    metrics, coefficients = jit(make_evaluation(GAME_LOSS, 0))(start(), {}, BATCH, 0)
    assert coefficients == {"loss_pixel": 1.0, "loss_generator": pytest.approx(0.1), "loss_discriminator": 1.0}
    assert float(metrics["loss_generator"][1]) == 4


def test_a_frozen_encoder_costs_no_gradient():
    params = start()["autoencoder"]
    keys = jax.random.split(jax.random.key(0), 4)

    def total(part, rest):
        return loss_of()({"autoencoder": {**part, **rest}}, BATCH, keys)[0]["pixel"].sum

    def cost(part, rest):
        return jit(jax.grad(total)).lower(part, rest).compile().cost_analysis()["flops"]

    assert cost({"decoder": params["decoder"]}, {"encoder": params["encoder"]}) < 0.9 * cost(params, {})


def test_the_discriminator_sees_seventy_pixels_at_its_usual_size():
    module = Discriminator(DiscriminatorConfig(width=2, depth=3))
    pixels = smooth_pictures(1, 96)
    params = {"params": params_of(lambda key: module.init(key, pixels)["params"])}
    # the norms spread over channels only, so a score depends on its patch alone
    influence = np.abs(jit(jax.grad(lambda x: module.apply(params, x)[0, 4, 4]))(pixels))
    for axis in (1, 2):
        found = np.flatnonzero(influence.sum(tuple({0, 1, 2, 3} - {axis})))
        assert (found.min(), found.max()) == (9, 78)
    assert jax.eval_shape(lambda: module.apply(params, pixels)).shape == (1, 10, 10)


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_the_smallest_image_has_one_score_and_widths_double_three_times(depth):
    config = DiscriminatorConfig(width=2, depth=depth)
    module, side = Discriminator(config), smallest_side(config)

    def scores(side):
        return module.init_with_output(jax.random.key(0), jnp.zeros((1, side, side, 3)))

    made, variables = jax.eval_shape(lambda: scores(side))
    assert made.shape == (1, 1, 1)
    assert 0 in jax.eval_shape(lambda: scores(side - 1))[0].shape
    widths = [variables["params"][f"conv_{i}"]["kernel"].value.shape[-1] for i in range(depth + 1)]
    assert widths == [2, 4, 8, 16, 16, 16][: depth + 1]


def test_distances_are_zero_for_equal_pictures_and_agree_with_their_formulas():
    target, pixels = smooth_pictures(3, 32), smooth_pictures(3, 32, seed=5)
    error = pixels - target
    for kind in pixel_losses.DISTANCES:
        assert not np.any(pixel_losses.pixel_distance(kind, target, target))
    size, delta = np.abs(error), pixel_losses.HUBER_DELTA
    huber = np.where(size < delta, size**2 / (2 * delta), size - delta / 2).mean((1, 2, 3))
    np.testing.assert_allclose(pixel_losses.pixel_distance("huber", pixels, target), huber, rtol=1e-5)
    np.testing.assert_allclose(pixel_losses.pixel_distance("l2", pixels, target), (error**2).mean((1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(pixel_losses.psnr(target + 0.2, target - 0.0), 10 * np.log10(4 / 0.04), rtol=1e-3)
    np.testing.assert_allclose(pixel_losses.psnr(target, target), 10 * np.log10(4e10), rtol=1e-3)  # the largest
    white = np.ones_like(target)
    np.testing.assert_allclose(pixel_losses.psnr(3 * white, white - 0.2), 10 * np.log10(4 / 0.04), rtol=1e-3)  # clipped


def test_the_pyramid_weighs_blur_more_than_the_plain_error_does():
    target = smooth_pictures(2, 32)
    assert not np.any(pixel_losses.laplacian_distance(target, target))
    impulse, taps = np.zeros((1, 9, 9, 1), np.float32), np.array([1, 4, 6, 4, 1]) / 16
    impulse[0, 4, 4] = 1
    np.testing.assert_allclose(pixel_losses._blur(impulse)[0, 2:7, 2:7, 0], np.outer(taps, taps), atol=1e-6)
    # brightness is in the coarsest of four levels alone, and both axes are alike
    np.testing.assert_allclose(pixel_losses.laplacian_distance(target + 0.2, target), 0.2 / 4, rtol=1e-4)
    turned = pixel_losses.laplacian_distance(target.swapaxes(1, 2), 0 * target)
    np.testing.assert_allclose(turned, pixel_losses.laplacian_distance(target, 0 * target), rtol=1e-5)
    blurred, shifted = pixel_losses._blur(jnp.asarray(target)), target.copy()
    shift = np.abs(np.asarray(blurred) - target).mean()
    shifted += shift  # as large an error, but a change of brightness

    def ratio(distance):
        return float(distance(blurred, target).mean() / distance(shifted, target).mean())

    plain = ratio(lambda *x: pixel_losses.pixel_distance("l1", *x))
    assert plain == pytest.approx(1, rel=1e-3)
    assert ratio(pixel_losses.laplacian_distance) > 1.5
    for side in (4, 5, 7):  # small and odd pictures have a pyramid too
        assert np.all(
            np.isfinite(pixel_losses.laplacian_distance(target[:, :side, :side], target[:, 1 : side + 1, :side]))
        )


def test_a_discriminator_too_deep_for_the_images_is_refused():
    settings = schema.from_dict(autoencoder.Settings, {"adversarial": {"discriminator": {"depth": 5}}})
    with pytest.raises(UserError, match="discriminator.depth: got 5 for images of"):
        autoencoder.make(MODEL, settings)
