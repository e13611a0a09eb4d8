"""The activations and the norm of the discriminator, by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.models.discriminator import Discriminator, DiscriminatorConfig


def test_negative_values_are_damped_five_times_and_small_ones_are_not_normalised_to_one():
    model = Discriminator(DiscriminatorConfig(width=4, depth=1))
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3))))["params"]
    params = jax.tree.map(jnp.zeros_like, params)
    params["conv_0"]["bias"] = jnp.full(4, -1.0)
    params["conv_1"] = {
        "kernel": jnp.zeros((4, 4, 4, 8)).at[1, 1, 0].set(0.01)
    }  # the pixel itself, one channel; no bias
    params["norm_1"]["scale"] = jnp.ones(8)
    params["score"]["kernel"] = params["score"]["kernel"].at[1, 1, 0].set(1.0)
    small = 0.2 * -1 * 0.01
    expected = 0.2 * small / np.sqrt(small**2 + 1e-6)
    np.testing.assert_allclose(
        model.apply({"params": params}, jnp.ones((1, 8, 8, 3))), [[[expected] * 2] * 2], rtol=1e-5
    )
