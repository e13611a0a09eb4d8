"""Flow-GRPO: policy gradient on the denoising steps of the diffusion transformer.

B rows, S trained steps, M hidden states of the image span, D decoder width, y x latent cells, C channels.

A row is a trajectory of the stochastic sampler. Each step is a Gaussian whose mean the transformer predicts, so it has
a density, a probability ratio and a KL divergence from the reference. The hidden states that condition the transformer
are constants: the decoder is not trained.

Source: Flow-GRPO (arXiv 2505.05470): clipped loss per step, KL divergence of the means, guidance during training with a
constant unconditional half, and fewer steps than at inference.
Differs from the reference: the condition is encoded once per trajectory.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from blip3o_jax import masked
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.model import Guidance
from blip3o_jax.config.schema import Count, Range, Weight
from blip3o_jax.diffusion import sde
from blip3o_jax.errors import require
from blip3o_jax.generate import stochastic
from blip3o_jax.generate.ar import TokenSampling
from blip3o_jax.models import blip3o
from blip3o_jax.objectives.objective import Objective
from blip3o_jax.objectives.policy import clipped_policy
from blip3o_jax.train.step import LossTerm
from blip3o_jax.types import FlowRollout, Metrics, Params


@dataclasses.dataclass(frozen=True)
class Settings(stochastic.StochasticDenoising):
    """Stochastic sampler, clipping and KL penalty."""

    train_steps: Count = 9  # S, the first steps of a trajectory
    clip: Annotated[float, Range(1e-8, 1)] = 1e-4  # the ratio is clipped to [1 - clip, 1 + clip]
    beta: Weight = 0.04  # weight of the KL divergence from the reference; 0: no reference
    sampling: TokenSampling = TokenSampling()  # of the image tokens, one set per prompt
    token_guidance_scale: Guidance | None = None  # of the image tokens; None: the model's default for the task

    def __post_init__(self):
        most = self.num_inference_steps
        require(self.train_steps <= most, "settings.train_steps", self.train_steps, f"1 to num_inference_steps {most}")


CONDITIONING = ("connector", "vae_connector")  # parts that may be trained besides the transformer
COPIED_MODULES: dict[str, str] = {f"reference_{part}": part for part in ("dit", *CONDITIONING)}
"""Extra module -> path of the model parameters that it is initialised from."""


def make(model: Blip3oConfig, settings: Settings) -> Callable:
    """Returns the loss function; parameters: `dit`, connectors, and those of `extra_modules`."""

    def loss(params: Params, batch: FlowRollout, keys: jax.Array) -> tuple[dict, Metrics]:
        del keys  # deterministic
        log_probs, kl = step_values(model, settings, params, batch)
        mask, clip = jnp.broadcast_to(batch.mask[:, None], log_probs.shape), settings.clip
        policy, metrics = clipped_policy(log_probs, batch.old_log_probs, batch.advantage, mask, clip, clip)
        terms = {"policy": LossTerm(*masked.metric(policy, mask))}
        if settings.beta:
            terms["kl"] = LossTerm(*masked.metric(kl * batch.kl_scale[:, None], mask), settings.beta)
            metrics["kl"] = masked.metric(kl, mask)
        return terms, metrics

    return loss


def step_values(
    model: Blip3oConfig, settings: Settings, params: Params, batch: FlowRollout
) -> tuple[jax.Array, jax.Array]:
    """Returns log-probabilities f32[B S] of the steps, and KL divergences f32[B S] from the reference (0 if none)."""
    given = batch.states, batch.ref_latent, batch.has_ref, settings
    policy, reference = stochastic.transitions(model, params, *given), None
    if settings.beta:
        frozen = {**params, **{part: params[f"reference_{part}"] for part in _copied(model)}}
        reference = stochastic.transitions(model, jax.lax.stop_gradient(frozen), *given)

    def body(carry, part):
        step, x, after = part
        there, kl = policy(x, step), jnp.zeros(x.shape[0])
        if reference is not None:
            kl = sde.kl_divergence(there, reference(x, step))
        return carry, (sde.log_prob(there, after), kl)

    path = batch.latents.swapaxes(0, 1)
    steps = (jnp.arange(settings.train_steps), path[:-1], path[1:])
    _, (log_probs, kl) = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), (), steps)
    return log_probs.T, kl.T


def _copied(model: Blip3oConfig) -> list[str]:
    return [part for part in ("dit", *CONDITIONING) if part in blip3o.modules(model)]


def extra_modules(model: Blip3oConfig, settings: Settings) -> dict[str, Callable[[jax.Array], Params]]:
    """Returns the initialisers of the reference's parts, if there is a KL penalty."""
    make_part = blip3o.initializers(model)
    return {f"reference_{part}": make_part[part] for part in _copied(model)} if settings.beta else {}


OBJECTIVE = Objective(Settings, make, extra_modules=extra_modules, copied=COPIED_MODULES)
