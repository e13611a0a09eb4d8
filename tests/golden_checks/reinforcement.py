"""The policy loss of GRPO and its gradient against Liger's, and Flow-GRPO's step."""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.diffusion import sde
from blip3o_jax.generate.ar import TokenSampling
from blip3o_jax.generate.scoring import token_log_probs
from blip3o_jax.objectives import grpo
from blip3o_jax.rl.advantages import form_advantages

TOLERANCE = 1e-5  # relative; of the largest value
CANCELLATION = 1e-7  # least error of float32 sums of terms of size 1 and either sign, as on-policy losses are
SAMPLING = TokenSampling(top_k=0, top_p=1.0)


def _close(got, expected, name: str) -> None:
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape, name
    assert np.abs(got - expected).max() <= max(TOLERANCE * np.abs(expected).max(), CANCELLATION), name


def check_advantages(recording: Mapping[str, np.ndarray]) -> None:
    """`grpo_rewards` -> `grpo_advantages`, and what sums of a group are."""
    rewards = recording["grpo_rewards"]
    got, equal = form_advantages("grpo", rewards.ravel(), rewards.shape[1])
    _close(got, recording["grpo_advantages"], "advantages")
    assert not equal.any()


def _log_probs(recording: Mapping[str, np.ndarray], hidden: jax.Array, head: str) -> jax.Array:
    ids = jnp.asarray(recording["grpo_ids"], jnp.int32)
    return token_log_probs(hidden, recording[head], ids, SAMPLING, chunk=3)[0]


def check_log_probs(recording: Mapping[str, np.ndarray]) -> None:
    """`grpo_hidden`, `grpo_head`, `grpo_ids` -> `grpo_logps`."""
    _close(_log_probs(recording, recording["grpo_hidden"], "grpo_head"), recording["grpo_logps"], "log-probs")


def check_policy_losses(recording: Mapping[str, np.ndarray]) -> None:
    """Losses, gradients and metrics of every reduction, with and without old log-probs, for every weight of the KL."""
    pattern = r"(grpo_(grpo|bnpo|dr_grpo)_old([01])_beta([\d.]+))_loss"
    cases = [found for key in recording if (found := re.fullmatch(pattern, key))]
    assert cases
    mask = recording["grpo_mask"].astype(bool)
    reference = _log_probs(recording, recording["grpo_ref_hidden"], "grpo_ref_head")
    for case in cases:
        name, reduction, has_old, beta = case.groups()
        settings = grpo.Settings(beta=float(beta), reduction=reduction)

        def loss(hidden, settings=settings, has_old=has_old):
            log_probs = _log_probs(recording, hidden, "grpo_head")
            old = recording["grpo_old_logps"] if has_old == "1" else jax.lax.stop_gradient(log_probs)
            ones = jnp.ones(len(mask))
            terms, metrics = grpo.policy_terms(
                settings, log_probs, old, reference, recording["grpo_advantages"], mask, ones
            )
            return sum(term.coefficient * term.sum / term.weight for term in terms.values()), metrics

        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(recording["grpo_hidden"])
        _close(value, recording[f"{name}_loss"], name)
        _close(gradient, recording[f"{name}_grad_hidden"], name)
        names = ["kl", "clip_fraction"] if settings.beta else ["clip_fraction"]
        _close([metrics[each][0] / metrics[each][1] for each in names], recording[f"{name}_metrics"], name)


def check_stochastic_steps(recording: Mapping[str, np.ndarray]) -> None:
    """`sde_*`: mean, deviation, sample and log-probabilities of every step."""
    steps = {found[1]: int(found[2]) for key in recording if (found := re.match(r"(sde_shift\d+_step(\d+))_x$", key))}
    assert steps
    for name, index in steps.items():
        step = {key: recording[f"{name}_{key}"] for key in ("x", "v", "z", "other", "prev", "sigmas")}
        got = sde.transition(step["x"], step["v"], index, step["sigmas"])
        _close(got.mean, recording[f"{name}_mean"], name)
        _close(sde.draw(got, step["z"]), step["prev"], name)
        _close(sde.log_prob(got, step["prev"]), recording[f"{name}_logp"], name)
        _close(sde.log_prob(got, step["other"]), recording[f"{name}_logp_other"], name)
