#!/usr/bin/env bash
# Tunix, GRPO with its default kl_loss_mode="kl" and beta=0.04: the divergence from the reference model has no effect on training. The
# gradient of the loss is the same, bit for bit, whether the reference is the policy itself, uniform, or the reverse of the policy.
# A policy whose rewards are all equal, which has nothing but the divergence to follow, stays 2.68 nats from its reference
# for 250 steps; with "low_var_kl" it arrives there. The reported "kl" is right in both cases, and does not fall.
# The term is log p - log q of sampled tokens, differentiated as it stands: what is left is the gradient of log p, of which the
# expectation over the policy's own samples is 0. The divergence is an expectation over the policy, whose gradient needs the factor
# log p - log q in front. So the term is noise on the policy's first pass over its samples. With num_iterations > 1 it is worse: it
# pushes down every token that was sampled. From a policy equal to its reference, without any reward, 100 passes over the same
# 256 tokens lead 0.28 nats away from it; with "low_var_kl" no step is taken.
# The documentation: beta "prevents policy updates from deviating too far from the reference model"; the modes are described as
# "Unbiased, high-variance" and "Unbiased, low-variance estimator", which is true of their values. DeepSeekMath, which it refers to,
# has the second (equation 4), as has PPO in Tunix.
# It hurts whoever relies on the default: the policy drifts off freely. Right is kl_loss_mode="low_var_kl", or "mse_kl", whose gradient is
# that of the divergence. Seen with google-tunix 0.1.7, the newest release. Exits 0 while that is so.
set -euo pipefail
python=$(command -v python3.11 || command -v python3.12 || command -v python3)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps 'google-tunix==0.1.7' 2>/dev/null
"$folder/venv/bin/pip" install --quiet 'jax==0.10.2' 'jaxlib==0.10.2' 'flax==0.12.8' 'optax==0.2.8' 'numpy==2.4.6' 'qwix==0.1.8' \
  'google-metrax==0.2.4' 'grain==0.2.18' 'orbax-checkpoint==0.12.8' 'huggingface_hub==2.4.0' 'jaxtyping==0.3.11' \
  'pandas==3.1.1' 'perfetto==0.59.1' 'pillow==13.0.0' 'sentencepiece==0.2.3' 'tqdm==4.70.1' 2>/dev/null
cat >"$folder/divergence.py" <<'PYTHON'
import importlib.metadata
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.rl import algo_core
from tunix.rl.grpo import grpo_learner

print("google-tunix", importlib.metadata.version("google-tunix"), "flax", flax.__version__, "jax", jax.__version__)
PAD, RATE = 5, 5.0  # of a vocabulary of six, the last of which is never drawn
POLICY = np.array([0.75, 0.1, 0.08, 0.05, 0.02])
print("default:", grpo_learner.GRPOConfig().kl_loss_mode, "beta", grpo_learner.GRPOConfig().beta)


class Model(nnx.Module):
    """Gives every token the same distribution."""

    def __init__(self, probabilities):
        self.logits = nnx.Param(jnp.asarray(np.log(probabilities), jnp.float32))

    def __call__(self, tokens, positions=None, attention_mask=None, cache=None):
        logits = jnp.append(self.logits[...], -1e9)
        return jnp.broadcast_to(logits, (*tokens.shape, PAD + 1)), cache

    def probabilities(self):
        return np.asarray(jax.nn.softmax(self.logits[...]), np.float64)


def divergence(p, q):
    return float(np.sum(p * np.log(p / q)))


def as_often_as_likely(probabilities, number=4096):
    """Tokens that stand for the expectation over the policy: each as often as it is likely."""
    edges = np.round(np.cumsum(probabilities) * number).astype(int)
    return np.repeat(np.arange(PAD), np.diff(edges, prepend=0))


def gradient(model, tokens, reference, mode):
    """The gradient and the reported divergence of completions of one token, whose rewards are equal."""
    config = grpo_learner.GRPOConfig(kl_loss_mode=mode)
    config.temperature = 1.0
    ids = jnp.asarray(tokens, jnp.int32)[:, None]
    example = grpo_learner.TrainExample(
        prompt_ids=jnp.zeros_like(ids),
        prompt_mask=jnp.ones_like(ids),
        completion_ids=ids,
        completion_mask=jnp.ones_like(ids),
        advantages=jnp.zeros(len(tokens)),
        ref_per_token_logps=jnp.asarray(np.log(reference), jnp.float32)[ids],
        old_per_token_logps=None,
    )
    loss = nnx.value_and_grad(algo_core.grpo_loss_fn, has_aux=True)
    (_, parts), gradients = loss(model, example, config, pad_id=PAD, eos_id=PAD)
    return np.asarray(gradients["logits"][...]), float(parts["kl"])


def train(start, reference, mode, steps, tokens=None):
    """New tokens of the policy in every step, or the same ones in all."""
    model = Model(start)
    reported = []
    for _ in range(steps):
        drawn = as_often_as_likely(model.probabilities()) if tokens is None else tokens
        change, kl = gradient(model, drawn, reference, mode)
        model.logits[...] = model.logits[...] - RATE * change
        reported.append(kl)
    return divergence(model.probabilities(), reference), reported


as_found = []
references = {"the policy": POLICY, "uniform": np.full(PAD, 1 / PAD), "reversed": POLICY[::-1]}
for mode in ("kl", "low_var_kl", "mse_kl"):
    found = {name: gradient(Model(POLICY), as_often_as_likely(POLICY), each, mode) for name, each in references.items()}
    for name, (change, kl) in found.items():
        exact = 0.04 * POLICY * (np.log(POLICY / references[name]) - divergence(POLICY, references[name]))
        print(f"{mode:<10} reference {name:<10} kl {kl:.3f}, expected {divergence(POLICY, references[name]):.3f};", end=" ")
        print(f"gradient {change.round(4) + 0.0}, of the divergence {exact.round(4) + 0.0}")
    same = all(np.array_equal(change, found["uniform"][0]) for change, _ in found.values())
    small = max(np.abs(change).max() for change, _ in found.values()) < 1e-5
    as_found += [same, small] if mode == "kl" else [not same, not small]
    as_found += [abs(found["reversed"][1] - divergence(POLICY, POLICY[::-1])) < 5e-3] if mode == "kl" else []

before = divergence(POLICY, POLICY[::-1])
for mode in ("kl", "low_var_kl"):
    after, reported = train(POLICY, POLICY[::-1], mode, 250)
    print(f"{mode:<10} 250 steps without a reward: divergence {before:.3f} before, {after:.3f} after, reported {reported[-1]:.3f}")
    as_found.append(abs(after - before) < 0.05 if mode == "kl" else after < 0.01)
tokens = np.random.default_rng(0).choice(PAD, 256, p=POLICY)
for mode in ("kl", "low_var_kl"):
    after, _ = train(POLICY, POLICY, mode, 100, tokens)
    print(f"{mode:<10} 100 passes over the same tokens without a reward, from the reference: divergence {after:.3f}")
    as_found.append(after > 0.01 if mode == "kl" else after < 1e-6)
sys.exit(0 if all(as_found) else 1)
PYTHON
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/divergence.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
