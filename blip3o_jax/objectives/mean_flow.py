"""Distillation of the diffusion transformer to a few steps: mean velocities over sampling steps, guidance included.

B rows, K draws per row, M condition tokens, E their width, y x latent cells, C latent channels.

u(x, t, r) is the mean of the velocity v along the flow from noise level t down to r <= t: one sampling step is
x + (r - t) u. By definition u = v - (t - r) du/dt, with the total derivative along the flow: a Jacobian-vector product
of u along (v, 1, 0). u is fitted to the right-hand side, held constant; for r = t this is v.

v is the guided velocity of the teacher, the initial transformer, so the student needs no unconditional half. Only the
transformer is trained. It starts as the teacher's unguided velocity for every r.

Source: MeanFlow (arXiv 2505.13447), improved MeanFlow (arXiv 2512.02012).
Differs from the reference:
1. v comes from a frozen teacher, not from pairs of data and noise, so the target has no variance given x.
2. (t, r) are drawn within the steps of samplers with 1 to `max_steps` steps.
3. The finest sinusoidal features of t make du/dt too large: they are blurred initially, and the layer that reads them
   is not trained.
4. The Jacobian-vector product is computed in the model's dtypes: float32 parameters, bfloat16 activations.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated

import flax.struct
import jax
import jax.numpy as jnp

from blip3o_jax import treepath
from blip3o_jax.config import Blip3oConfig, MeanFlowConfig
from blip3o_jax.config.model import Guidance
from blip3o_jax.config.schema import Natural, OneOf, Positive, Range, Share
from blip3o_jax.diffusion import flow, guidance
from blip3o_jax.errors import UserError
from blip3o_jax.generate import paint
from blip3o_jax.models import blip3o, sana
from blip3o_jax.nn import kernels
from blip3o_jax.objectives import joint
from blip3o_jax.objectives.objective import Objective
from blip3o_jax.train.step import LossTerm
from blip3o_jax.types import Batch, Metrics, Params


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the distillation."""

    max_steps: Annotated[int, Range(1, 1000)] = 4  # sampling steps of the student by default; fewer are trained, too
    guidance_scale: Guidance = 2.0  # of the teacher; 1: none
    draws: Annotated[int, Range(1, 256)] = 1  # K
    time_blur: Annotated[float, Range(0, 1)] = 0.02  # standard deviation in noise levels, see difference 3
    instant_share: Share = 0.25  # fraction of draws with r = t
    weight_power: Annotated[float, Range(0, 2)] = 1.0  # an error e is weighted by (e + weight_floor) ** -weight_power
    weight_floor: Positive = 1e-3
    window: Annotated[str, OneOf("span", "tail")] = "span"  # see `joint.Settings`
    encode_rows: Natural = 0  # see `joint.Settings`


@flax.struct.dataclass
class Draw:
    """Random numbers of a batch; the K*B rows are ordered by draw, then by row."""

    sigma: jax.Array  # f32[K*B], t
    until: jax.Array  # f32[K*B], r
    noise: jax.Array  # f32[K*B y x C]


def make(model: Blip3oConfig, settings: Settings) -> Callable:
    """Returns the loss function; parameters: those of the model, and `teacher`."""

    def loss(params: Params, batch: Batch, keys: jax.Array) -> tuple[dict[str, LossTerm], Metrics]:
        codes, features = joint.encode_codes(model, params, batch, at_a_time=settings.encode_rows)
        hidden, _ = joint.read(model, params, batch, codes, features)
        states = blip3o.condition_window(model, hidden, batch.window_start, settings.window)
        latent, ref_latent, has_ref = joint.encode_latents(model, params, batch, settings.encode_rows)
        condition = jax.lax.stop_gradient(blip3o.make_condition(model, params, states, ref_latent, has_ref))
        params = {**params, "dit": _times_held(params["dit"])}
        drawn = draw(model, settings, keys, latent.shape[1:])
        error = errors(model, settings, params, condition, latent, ref_latent, drawn)
        weight = (jax.lax.stop_gradient(error) + settings.weight_floor) ** -settings.weight_power
        count, one = jnp.float32(error.size), jnp.float32(1)
        metrics = {"mean_flow_error": (error.sum(), count), "images": (jnp.float32(len(latent)), one)}
        return {"mean_flow": LossTerm((weight * error).sum(), count)}, metrics

    return loss


def geometry(model: Blip3oConfig, settings: Settings) -> Blip3oConfig:
    """Returns the geometry with a mean-flow transformer.

    Raises:
      UserError: the model is already distilled.
    """
    if model.dit.mean_flow is not None:
        raise UserError(
            "init_from: the checkpoint is already distilled",
            expected="one that predicts velocities",
            do="start from the checkpoint that it was distilled from",
        )
    made_for = MeanFlowConfig(settings.max_steps, settings.guidance_scale)
    return dataclasses.replace(model, dit=dataclasses.replace(model.dit, mean_flow=made_for))


def extra_modules(model: Blip3oConfig, settings: Settings) -> dict[str, Callable[[jax.Array], Params]]:
    """Returns the initialiser of the teacher."""
    return {"teacher": blip3o.initializers(_taught_by(model))["dit"]}


def first_parameters(
    model: Blip3oConfig, settings: Settings, params: Params, frozen: Params, draw_batch: Callable, key: jax.Array
) -> Params:
    """Returns the parameters with blurred features of the noise level."""
    del frozen, draw_batch, key
    leaves, kernel = treepath.flatten(params), "dit/time_embed/in/kernel"
    if model.dit.name == "sana" and kernel in leaves:
        width = settings.time_blur * model.schedule.num_train_timesteps * model.dit.timestep_scale
        leaves[kernel] = leaves[kernel] * sana.feature_means(width, leaves[kernel].shape[0])[:, None]
    return treepath.unflatten(leaves)


def draw(model: Blip3oConfig, settings: Settings, keys: jax.Array, shape: tuple[int, ...]) -> Draw:
    """Draws sampling steps, noise levels within them, and noises, each row from its own key.

    `keys` are key[B], `shape` is (y, x, C) of a latent.
    """

    def one(key):
        steps, which, within, instant, noise = jax.random.split(key, 5)
        count = jax.random.randint(steps, (), 1, settings.max_steps + 1)
        end = 1 - (jax.random.randint(which, (), 0, count) + 1) / count
        start = end + (1 - jax.random.uniform(within)) / count
        end = jnp.where(jax.random.bernoulli(instant, settings.instant_share), start, end)
        sigma, until = (flow.shift_sigmas(level, model.schedule.shift) for level in (start, end))
        return Draw(sigma, until, jax.random.normal(noise, shape))

    def row(key):
        return jax.vmap(one)(jax.random.split(key, settings.draws))

    rows = jax.vmap(row)(keys)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), rows)


def errors(
    model: Blip3oConfig,
    settings: Settings,
    params: Params,
    condition: jax.Array,
    latent: jax.Array,
    ref_latent: jax.Array | None,
    drawn: Draw,
) -> jax.Array:
    """Returns mean squared errors f32[K*B] of the mean velocity.

    Args:
      condition: dtype[B M E].
      latent: f32[B y x C], data.
      ref_latent: f32[B y x C], reference latents; None if the model does not use them.
    """
    x = flow.interpolate(jnp.tile(latent, (settings.draws, 1, 1, 1)), drawn.noise, drawn.sigma)
    along = jax.lax.stop_gradient(_teacher_velocity(model, settings, params, condition, x, drawn.sigma, ref_latent))
    conditions = joint.for_draws(model, params, condition, settings.draws)

    def mean_velocity(params, conditions, x, sigma, until):
        return blip3o.velocity(model, params, x, sigma, conditions, ref_latent, until)

    point = x, drawn.sigma, drawn.until
    aim = _target(lambda *point: mean_velocity(*jax.lax.stop_gradient((params, conditions)), *point), point, along)
    return jnp.square(mean_velocity(params, conditions, *point) - jax.lax.stop_gradient(aim)).mean(axis=(1, 2, 3))


def _target(mean_velocity: Callable, point: tuple[jax.Array, jax.Array, jax.Array], along: jax.Array) -> jax.Array:
    """Returns v - (t - r) du/dt at a point (x, t, r), where v = `along` is the velocity of the flow."""
    x, sigma, until = point
    with kernels.forced_branch(kernels.PLAIN):
        _, slope = jax.jvp(mean_velocity, point, (along, jnp.ones_like(sigma), jnp.zeros_like(until)))
    return along - (sigma - until)[:, None, None, None] * slope


def _times_held(dit: Params) -> Params:
    """Returns the transformer with a constant first layer of the noise-level embedding."""
    if "time_embed" not in dit:
        return dit
    embed = dit["time_embed"]
    return {**dit, "time_embed": {**embed, "in": jax.lax.stop_gradient(embed["in"])}}


def _taught_by(model: Blip3oConfig) -> Blip3oConfig:
    return dataclasses.replace(model, dit=dataclasses.replace(model.dit, mean_flow=None))


def _teacher_velocity(model, settings, params, condition, x, sigma, ref_latent) -> jax.Array:
    """Returns the guided velocity f32[K*B y x C] of the teacher at noise levels f32[K*B]."""
    plain, params = _taught_by(model), {**params, "dit": params["teacher"]}
    own = (paint.encode(plain, params, condition),) * settings.draws
    if settings.guidance_scale == 1:
        return blip3o.velocity(plain, params, x, sigma, own, ref_latent)
    null = (paint.unconditional(plain, params, condition.shape[1]),) * settings.draws
    both = blip3o.velocity(plain, params, *(jnp.concatenate([y, y]) for y in (x, sigma)), (*null, *own), ref_latent)
    return guidance.extrapolate(*jnp.split(both, 2), settings.guidance_scale)


OBJECTIVE = Objective(
    Settings,
    make,
    geometry=geometry,
    fields=joint.fields,
    extra_modules=extra_modules,
    copied={"teacher": "dit"},
    first_parameters=first_parameters,
)
