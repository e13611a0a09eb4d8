"""An objective of your own: flow matching alone, by a robust distance; the decoder only reads.

python train.py --config=examples/objective.py --workdir=runs/objective

`blip3o_jax/objectives/objective.py` says what an objective may bring.
"""

import dataclasses

import jax
import jax.numpy as jnp

from blip3o_jax.config.schema import Positive
from blip3o_jax.models import blip3o
from blip3o_jax.objectives import Objective, joint
from blip3o_jax.train.step import LossTerm


@dataclasses.dataclass(frozen=True)
class Settings:
    """The section `settings` of a configuration."""

    huber_delta: Positive = 0.5  # errors below are squared, those above count linearly


def make(model, settings):
    """The loss function of `train.step`."""

    def loss(params, batch, keys):
        codes, features = joint.encode_codes(model, params, batch)
        hidden, _ = joint.read(model, params, batch, codes, features)
        states = blip3o.condition_window(model, hidden, batch.window_start)
        latent, ref_latent, has_ref = joint.encode_latents(model, params, batch)
        condition = blip3o.make_condition(model, params, states, ref_latent, has_ref)
        encoded = blip3o.apply(model, params, "dit", "encode_condition", condition)
        noise = jax.vmap(lambda key: jax.random.normal(key, latent.shape[1:]))(keys)
        sigma = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1)))(keys)
        level = sigma[:, None, None, None]
        noisy = (1 - level) * latent + level * noise
        error = blip3o.velocity(model, params, noisy, sigma, (encoded,), ref_latent) - (noise - latent)
        small = jnp.minimum(jnp.abs(error), settings.huber_delta)
        rows = (small * (jnp.abs(error) - small / 2)).mean(axis=(1, 2, 3))
        count = jnp.float32(rows.shape[0])
        return {"robust_flow": LossTerm(rows.sum(), count)}, {"images": (count, jnp.float32(1))}

    return loss


OBJECTIVE = Objective(Settings=Settings, make=make, fields=joint.fields)


def get_config():
    """The `pretrain` stage of configs/tiny.py with this objective; only connector and diffusion backbone train."""
    from configs import common, tiny

    config = tiny.get_config("pretrain")
    config.objective = "examples.objective:OBJECTIVE"
    config.settings = {"huber_delta": 0.2}
    config.trainable = common.CONNECTORS_AND_DIT
    return config
