"""Distilling to a few steps: the target's formula and derivative, what is drawn, and what the run starts from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax import treepath
from blip3o_jax.config import MeanFlowConfig
from blip3o_jax.config.presets import preset
from blip3o_jax.config.schema import with_dtype
from blip3o_jax.diffusion import flow
from blip3o_jax.errors import UserError
from blip3o_jax.models import blip3o
from blip3o_jax.objectives import mean_flow
from blip3o_jax.types import Batch
from support.small import jit, params_of

PLAIN = preset("tiny-edit")
SETTINGS = mean_flow.Settings(draws=2, instant_share=0.0)
MODEL = mean_flow.geometry(PLAIN, SETTINGS)
B, SHAPE = 3, (2, 2, 32)
RNG = np.random.default_rng(0)
LATENT, REFERENCE = (RNG.normal(size=(B, *SHAPE)).astype(np.float32) for _ in range(2))
CONDITION = RNG.normal(size=(B, 1 + MODEL.num_image_tokens + 4, 96)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(0), B)


@pytest.fixture(scope="module")
def params():
    """A student that starts as its teacher."""
    make = blip3o.initializers(MODEL)
    made = {part: params_of(make[part]) for part in ("dit", "connector", "vae_connector")}
    last = made["dit"]["interval_embed"]["out"]
    last["kernel"] = np.zeros_like(last["kernel"])  # as it starts
    teacher = {name: leaves for name, leaves in made["dit"].items() if name != "interval_embed"}
    return {**made, "teacher": teacher}


def moved(params):
    """The student after some training."""
    noisy = lambda leaf: leaf + 0.05 * np.random.default_rng(leaf.size).normal(size=leaf.shape)  # noqa: E731
    return {**params, "dit": jax.tree.map(lambda leaf: noisy(leaf).astype(np.float32), params["dit"])}


def errors(settings, params, drawn, model=MODEL):
    run = jit(lambda params, drawn: mean_flow.errors(model, settings, params, CONDITION, LATENT, REFERENCE, drawn))
    return np.asarray(run(params, drawn))


def drawn_for(settings):
    return mean_flow.draw(MODEL, settings, KEYS, SHAPE)


def test_target_is_its_formula():
    x, v = (RNG.normal(size=(2, 3, 3, 2)) for _ in range(2))
    t, r = np.array([0.9, 0.4]), np.array([0.25, 0.4])

    def u(x, t, r):
        t, r = (y[:, None, None, None] for y in (t, r))
        return jnp.sin(x) * t + r * x**2 + t**3

    got = mean_flow._target(u, tuple(jnp.float32(y) for y in (x, t, r)), jnp.float32(v))
    t, r = t[:, None, None, None], r[:, None, None, None]
    along_the_flow = (np.cos(x) * t + 2 * r * x) * v + np.sin(x) + 3 * t**2
    np.testing.assert_allclose(got, v - (t - r) * along_the_flow, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(got[1], v[1], rtol=1e-6)  # r = t: the velocity itself


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.01), ("bfloat16", 0.1)])
def test_the_product_through_the_model_is_its_derivative(params, dtype, tolerance):
    model = with_dtype(MODEL, dtype=dtype, param_dtype="float32", remat="none", unroll=False)
    blurred = moved(params)
    blurred["dit"] = mean_flow.first_parameters(MODEL, SETTINGS, {"dit": blurred["dit"]}, None, None, None)["dit"]
    drawn, along = drawn_for(mean_flow.Settings()), jnp.float32(RNG.normal(size=LATENT.shape))

    def u(x, t, r, model=MODEL):
        return blip3o.velocity(model, blurred, x, t, jnp.asarray(CONDITION), REFERENCE, r)

    t, r = 0.2 + 0.5 * drawn.sigma, 0.1 * drawn.sigma
    target = jit(lambda *point: mean_flow._target(lambda *p: u(*p, model), point, along))(LATENT, t, r)
    got = (along - target) / (t - r)[:, None, None, None]
    h = 1e-3
    ahead, behind = (jit(u)(LATENT + step * along, t + step, r) for step in (h, -h))
    slope = (ahead - behind) / (2 * h)
    assert np.abs(slope).max() > 0.1
    assert np.linalg.norm(got - slope) < tolerance * np.linalg.norm(slope)


def test_a_student_that_has_learnt_nothing_is_its_teacher(params):
    settings = mean_flow.Settings(draws=2, instant_share=1.0, guidance_scale=1.0)
    drawn = drawn_for(settings)
    np.testing.assert_array_equal(drawn.sigma, drawn.until)
    np.testing.assert_allclose(errors(settings, params, drawn), 0, atol=1e-10)
    assert errors(dataclasses.replace(settings, guidance_scale=3.0), params, drawn).min() > 1e-6


def test_where_r_is_t_it_is_flow_matching_to_the_guided_teacher(params):
    settings = mean_flow.Settings(draws=2, instant_share=1.0, guidance_scale=3.0)
    drawn, student = drawn_for(settings), moved(params)
    x = flow.interpolate(jnp.tile(LATENT, (2, 1, 1, 1)), drawn.noise, drawn.sigma)

    def velocity(model, dit, condition):
        return blip3o.velocity(model, {"dit": dit}, x, drawn.sigma, jnp.tile(condition, (2, 1, 1)), REFERENCE)

    nothing = blip3o.drop_condition(PLAIN, params, jnp.asarray(CONDITION), jnp.ones(B, bool))
    null, conditioned = (velocity(PLAIN, params["teacher"], c) for c in (nothing, CONDITION))
    expected = np.square(velocity(MODEL, student["dit"], CONDITION) - (3 * conditioned - 2 * null)).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(errors(settings, student, drawn), expected, rtol=1e-3)


def test_draws_are_within_the_steps_of_sampling_and_depend_on_their_row_alone():
    settings = mean_flow.Settings(max_steps=4, draws=300, instant_share=0.0)
    drawn = drawn_for(settings)
    widest = {}  # end of a step of sampling -> where the longest one begins
    for steps in range(1, 5):
        levels = np.round(flow.inference_sigmas(MODEL.schedule, steps), 5)
        widest.update({end: max(start, widest.get(end, 0)) for start, end in zip(levels[:-1], levels[1:], strict=True)})
    for sigma, until in zip(np.asarray(drawn.sigma), np.round(np.asarray(drawn.until), 5), strict=True):
        assert until < sigma <= widest[until] + 1e-5
    assert set(np.round(np.asarray(drawn.until), 5)) == set(widest)
    part = mean_flow.draw(MODEL, settings, KEYS[1:], SHAPE)
    np.testing.assert_array_equal(drawn.sigma.reshape(300, B)[:, 1:], part.sigma.reshape(300, B - 1))


def test_only_the_student_has_gradients_and_its_time_features_have_none(params):
    def loss(params):
        held = {**params, "dit": mean_flow._times_held(params["dit"])}
        drawn = drawn_for(mean_flow.Settings())
        return mean_flow.errors(MODEL, mean_flow.Settings(), held, CONDITION, LATENT, REFERENCE, drawn).sum()

    gradient = jit(jax.grad(loss))(moved(params))
    largest = lambda tree: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert largest(gradient["teacher"]) == largest(gradient["connector"]) == 0
    assert largest(gradient["dit"]["time_embed"]["in"]) == 0 < largest(gradient["dit"]["time_embed"]["out"])
    assert largest(gradient["dit"]["interval_embed"]) > 0 < largest(gradient["dit"]["caption_projection"])


def test_the_loss_weighs_an_error_by_its_constant_size_and_trains_the_student_alone(params):
    codes, start = MODEL.num_image_tokens, 3
    slot = np.full((1, start + codes + 2), -1, np.int32)
    slot[:, start + 1 : start + 1 + codes] = np.arange(codes)
    batch = Batch(
        tokens=np.zeros(slot.shape, np.int32),
        length=np.array([slot.size], np.int32),
        loss_mask=slot >= 0,
        image_slot=slot,
        window_start=np.array([start], np.int32),
        ref_mask=np.ones((1, 1), bool),
        target_codes=np.arange(codes, dtype=np.int32)[None],
        target_latent=LATENT[:1],
        ref_latent=REFERENCE[:1],
    )
    settings = mean_flow.Settings(weight_power=0.5, weight_floor=0.1)
    loss = mean_flow.make(MODEL, settings)
    decoder = params_of(blip3o.initializers(MODEL)["decoder"])

    def sums(trained):
        terms, metrics = loss({**params, "decoder": decoder, **trained}, batch, KEYS[:1])
        return terms["mean_flow"].sum, metrics["mean_flow_error"][0]

    trained = {"dit": moved(params)["dit"], "connector": params["connector"]}
    (value, error), gradients = jit(lambda trained: (sums(trained), jax.jacrev(sums)(trained)))(trained)
    np.testing.assert_allclose(value, error * (error + 0.1) ** -0.5, rtol=1e-5)
    ours, plain = (treepath.flatten(tree) for tree in gradients)
    for path in ours:
        np.testing.assert_allclose(ours[path], plain[path] * (error + 0.1) ** -0.5, rtol=1e-3, atol=1e-6)
        held = path.startswith(("connector", "dit/time_embed/in"))
        assert not (held and np.any(ours[path])), path
    assert np.any(ours["dit/proj_out/kernel"])


def test_the_features_of_the_noise_level_start_blurred_by_its_deviation():
    kernel = {"dit": {"time_embed": {"in": {"kernel": jnp.ones((256, 3))}}}}
    model = dataclasses.replace(MODEL, dit=dataclasses.replace(MODEL.dit, timestep_scale=0.5))
    got = mean_flow.first_parameters(model, mean_flow.Settings(time_blur=0.02), kernel, None, None, None)
    frequency = np.exp(-np.log(1e4) * np.arange(128) / 128) * 0.5
    # the mean of a cosine under a Gaussian of 20 timesteps
    expected = np.tile(np.exp(-((frequency * 20) ** 2) / 2), 2)
    np.testing.assert_allclose(got["dit"]["time_embed"]["in"]["kernel"][:, 0], expected, atol=1e-4)


def test_the_model_says_what_it_was_distilled_to_and_is_not_distilled_again():
    assert MODEL.dit.mean_flow == MeanFlowConfig(4, 2.0)
    with pytest.raises(UserError, match="init_from: the checkpoint is already distilled - .* distilled from"):
        mean_flow.geometry(MODEL, SETTINGS)


def test_a_step_down_the_gradient_comes_nearer_to_the_target(params):
    settings = mean_flow.Settings(draws=2, instant_share=1.0)
    drawn = drawn_for(settings)

    @jit
    def value_and_gradient(dit):
        mean = lambda dit: mean_flow.errors(  # noqa: E731
            MODEL, settings, {**params, "dit": dit}, CONDITION, LATENT, REFERENCE, drawn
        ).mean()
        return jax.value_and_grad(mean)(dit)

    before, gradient = value_and_gradient(params["dit"])
    size = 0.05 * before / sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradient))
    after, _ = value_and_gradient(jax.tree.map(lambda leaf, g: leaf - size * g, params["dit"], gradient))
    assert 0.9 * before < after < 0.98 * before
