"""The policy loss of GRPO and its gradient as Liger computes them, and Flow-GRPO's step."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.diffusion import sde
from blip3o_jax.generate.ar import TokenSampling
from blip3o_jax.generate.scoring import token_log_probs
from blip3o_jax.objectives import grpo
from blip3o_jax.rl.advantages import EPSILON, form_advantages
from golden_checks import Recording

SAMPLING = TokenSampling(top_k=0, top_p=1.0)


def advantages(recording: Recording) -> dict[str, np.ndarray]:
    """`grpo_rewards` -> `grpo_advantages`.

    Of a group whose rewards are all equal ours are 0; the reference's are what rounding of the mean leaves.
    """
    rewards, recorded = recording["grpo_rewards"], recording["grpo_advantages"]
    got, constant = form_advantages("grpo", rewards.ravel(), rewards.shape[1])
    equal = np.repeat(np.ptp(rewards, axis=1) == 0, rewards.shape[1])
    np.testing.assert_array_equal(constant, equal)
    np.testing.assert_array_equal(got[equal], 0)
    rounding = np.finfo(np.float32).eps * np.abs(rewards.ravel()) / EPSILON
    return {"grpo_advantages": np.where(equal & (np.abs(recorded) <= rounding), recorded, got)}


def _log_probs(recording: Recording, hidden: jax.Array, head: str) -> jax.Array:
    ids = jnp.asarray(recording["grpo_ids"], jnp.int32)
    return token_log_probs(hidden, recording[head], ids, SAMPLING, chunk=3)[0]


def log_probs(recording: Recording) -> dict[str, np.ndarray]:
    """`grpo_hidden`, `grpo_head`, `grpo_ids` -> `grpo_logps`."""
    return {"grpo_logps": _log_probs(recording, recording["grpo_hidden"], "grpo_head")}


def policy_losses(recording: Recording) -> dict[str, np.ndarray]:
    """Losses, gradients and metrics of every reduction, with and without old log-probs, for every weight of the KL."""
    pattern = r"(grpo_(grpo|bnpo|dr_grpo)_old([01])_beta([\d.]+))_loss"
    mask = recording["grpo_mask"].astype(bool)
    reference = _log_probs(recording, recording["grpo_ref_hidden"], "grpo_ref_head")
    results = {}
    for case in filter(None, (re.fullmatch(pattern, key) for key in recording)):
        name, reduction, has_old, beta = case.groups()
        settings = grpo.Settings(beta=float(beta), reduction=reduction)

        def loss(hidden, settings=settings, has_old=has_old):
            log_probs = _log_probs(recording, hidden, "grpo_head")
            old = recording["grpo_old_logps"] if has_old == "1" else jax.lax.stop_gradient(log_probs)
            batch = types.SimpleNamespace(
                old_log_probs=old, ref_log_probs=reference, advantage=recording["grpo_advantages"],
                kl_scale=jnp.ones(len(mask)), mean_rows=None,
            )  # fmt: skip
            terms, metrics = grpo.policy_terms(settings, log_probs, mask, batch)
            return sum(term.coefficient * term.sum / term.weight for term in terms.values()), metrics

        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(recording["grpo_hidden"])
        names = ["kl", "clip_fraction"] if settings.beta else ["clip_fraction"]
        results[f"{name}_loss"], results[f"{name}_grad_hidden"] = value, gradient
        results[f"{name}_metrics"] = np.array([metrics[each][0] / metrics[each][1] for each in names])
    return results


def stochastic_steps(recording: Recording) -> dict[str, np.ndarray]:
    """`sde_*`: mean, coefficient of the noise (`std`), sample and log-probabilities of every step."""
    results = {}
    for found in filter(None, (re.fullmatch(r"(sde_shift\d+_step(\d+))_x", key) for key in recording)):
        name, index = found[1], int(found[2])
        step = {key: recording[f"{name}_{key}"] for key in ("x", "v", "z", "other", "prev", "sigmas")}
        got = sde.transition(step["x"], step["v"], index, step["sigmas"])
        results |= {
            f"{name}_mean": got.mean,
            f"{name}_std": np.broadcast_to(got.diffusion, recording[f"{name}_std"].shape),
            f"{name}_prev": sde.draw(got, step["z"]),
            f"{name}_logp": sde.log_prob(got, step["prev"]),
            f"{name}_logp_other": sde.log_prob(got, step["other"]),
        }
    return results
