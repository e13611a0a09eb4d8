"""Flow-GRPO: its loss against its formula in float64, and the log-probabilities and divergences that enter it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax import masked
from blip3o_jax.config import EditConfig
from blip3o_jax.config.presets import preset
from blip3o_jax.generate import stochastic
from blip3o_jax.models import blip3o
from blip3o_jax.objectives import flow_grpo
from blip3o_jax.types import FlowRollout
from support.small import params_of

MODEL = dataclasses.replace(preset("tiny"), edit=EditConfig(vae_condition=True))
SIZE = 8, 8
B, S = 3, 2
RNG = np.random.default_rng(0)


def rollout(**fields) -> FlowRollout:
    rest = {"states": None, "latents": None, "old_log_probs": np.zeros((B, S), np.float32)}
    rest |= {"mask": np.ones(B, bool), "advantage": np.ones(B, np.float32), "kl_scale": np.ones(B, np.float32)}
    return FlowRollout(**(rest | fields))


def test_the_loss_is_its_formula(monkeypatch):
    old = RNG.normal(size=(B, S)).astype(np.float32)
    new = old + np.log([[1.5, 1.05], [0.5, 1.2], [np.nan, 1]]).astype(np.float32)
    kl = np.array([[1, 2], [3, 4], [np.nan, 5]], np.float32)
    batch = rollout(
        old_log_probs=old,
        mask=np.array([True, True, False]),
        advantage=np.array([2.0, -1.0, 7.0]),
        kl_scale=np.array([1.0, 10.0, 1.0]),
    )
    monkeypatch.setattr(flow_grpo, "step_values", lambda *inputs: (jnp.asarray(new), jnp.asarray(kl)))
    terms, metrics = flow_grpo.make(
        MODEL, flow_grpo.Settings(num_inference_steps=S, train_steps=S, clip=0.1, beta=0.5)
    )({}, batch, None)
    value = {name: float(term.coefficient * term.sum / term.weight) for name, term in terms.items()}
    # gains beyond the clip are cut, losses are not: 2 * 1.1, 2 * 1.05, -1 * 0.9, -1 * 1.2
    assert value == pytest.approx({"policy": -(2.2 + 2.1 - 0.9 - 1.2) / 4, "kl": 0.5 * (1 + 2 + 30 + 40) / 4}, rel=1e-5)
    got = masked.averages(metrics)
    assert got["kl"] == pytest.approx(2.5) and got["clip_fraction"] == 0.5


def test_values_of_an_update_are_those_of_sampling_and_the_reference_has_connectors_of_its_own():
    make = blip3o.initializers(MODEL)
    params = {part: params_of(make[part]) for part in ("dit", "connector", "vae_connector")}
    settings = flow_grpo.Settings(num_inference_steps=3, train_steps=S)
    latent = SIZE[0] // MODEL.autoencoder.spatial_factor, SIZE[1] // MODEL.autoencoder.spatial_factor
    given = {
        "states": RNG.normal(size=(B, 1 + MODEL.num_image_tokens, MODEL.decoder.width)).astype(np.float32),
        "ref_latent": RNG.normal(size=(B, *latent, MODEL.autoencoder.latent_channels)).astype(np.float32),
        "has_ref": np.array([True, False, True]),
    }
    keys = jax.random.split(jax.random.key(0), B)
    path, log_probs = stochastic.sample(MODEL, params, *given.values(), keys, settings, SIZE)
    batch = rollout(latents=path[:, : 1 + S], **given)
    copies = {name: params[part] for name, part in flow_grpo.COPIED_MODULES.items()}
    assert flow_grpo.extra_modules(MODEL, settings).keys() == copies.keys()
    values = jax.jit(lambda params: flow_grpo.step_values(MODEL, settings, params, batch))
    got, kl = values({**params, **copies})
    np.testing.assert_allclose(got, log_probs[:, :S], atol=1e-4)
    np.testing.assert_array_equal(kl, 0)
    for name, copy in copies.items():
        moved = jax.tree.map(lambda leaf: 1.1 * leaf, copy)
        again, kl = values({**params, **copies, name: moved})
        np.testing.assert_array_equal(again, got)
        assert ((np.asarray(kl) > 0) == (given["has_ref"][:, None] | (name != "reference_vae_connector"))).all(), name
