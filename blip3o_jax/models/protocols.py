"""The interface of diffusion backbones. One from outside the package is named `package.module:attribute`.

B batch, b rows of one group, y x latent cells, C latent channels, M condition tokens, E their width.
"""

from typing import Any, ClassVar, Protocol

import jax

from blip3o_jax.config import BackboneConfig

EncodedCondition = Any
"""A backbone's encoding of a condition: a tree of arrays, shared by all denoising steps."""


class Denoiser(Protocol):
    """A Linen module with one field, `config`, that predicts velocities.

    Attributes:
      Config: frozen dataclass that derives from `BackboneConfig` and reads the section `model.dit`.
    """

    Config: ClassVar[type[BackboneConfig]]
    config: BackboneConfig

    def encode_condition(self, condition: jax.Array, log_weight: jax.Array | None = None) -> EncodedCondition:
        """Computes everything that depends on the condition only, once for all steps.

        Args:
          condition: dtype[b M E], an unordered set of tokens. b = 1 serves any number of rows.
          log_weight: f32[b M], log of the multiplicity of every token: N equal tokens are one with log N. None: 1.
        """

    def __call__(
        self, x: jax.Array, t: jax.Array, conditions: tuple[EncodedCondition, ...], interval: jax.Array | None = None
    ) -> jax.Array:
        """Predicts the velocity of len(conditions) equal groups of rows, each under its own condition.

        `interval` is passed with `config.mean_flow` only; a backbone that is never distilled to few steps can omit it.

        Args:
          x: f32[B y x C], noisy latents of any size, group after group.
          t: f32[B] in [0, 1000], 0 = data.
          conditions: one per group.
          interval: f32[B] in [0, t]: predict the mean velocity from t to t - interval. None: the velocity at t.

        Returns:
          f32[B y x C], noise - data.
        """

    def denoise(self, x: jax.Array, t: jax.Array, condition: jax.Array, interval: jax.Array | None = None) -> jax.Array:
        """Predicts the velocity under one condition dtype[B M E]; uses every parameter."""

    @staticmethod
    def flops(config: BackboneConfig, cells: int, condition: int) -> tuple[float, float]:
        """Counts floating-point operations on one row, for MFU and plans.

        Returns:
          Operations of `encode_condition` on `condition` tokens, and of one call on `cells` latent cells.
        """
