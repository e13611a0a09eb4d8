"""What a diffusion backbone has to offer. One from outside the package is named `package.module:attribute`.

B batch, b rows of one group, y x latent cells, C latent channels, M condition tokens, E their width.
"""

from typing import Any, ClassVar, Protocol

import jax

from blip3o_jax.config import BackboneConfig

EncodedCondition = Any
"""What a backbone makes of a condition: a tree of arrays, the same for every step of denoising."""


class Denoiser(Protocol):
    """A Linen module of one field, `config`, that predicts velocities.

    Attributes:
      Config: frozen dataclass that derives from `BackboneConfig`; it reads the section `model.dit`.
    """

    Config: ClassVar[type[BackboneConfig]]
    config: BackboneConfig

    def encode_condition(self, condition: jax.Array, log_weight: jax.Array | None = None) -> EncodedCondition:
        """Computes what depends on the condition alone, once for all steps.

        Args:
          condition: dtype[b M E]; a set, tokens have no order. b = 1 serves any number of rows.
          log_weight: f32[b M], log of how often a token counts: N equal tokens are given as one with log N. None: once.
        """

    def __call__(
        self, x: jax.Array, t: jax.Array, conditions: tuple[EncodedCondition, ...], interval: jax.Array | None = None
    ) -> jax.Array:
        """Predicts the velocity of len(conditions) equal groups of rows, each under its own condition.

        A backbone that is not to be distilled to few steps needs no `interval`: it is given where `config.mean_flow`.

        Args:
          x: f32[B y x C], noisy latents of any size, group after group.
          t: f32[B] in [0, 1000], 0 = data.
          conditions: one per group.
          interval: f32[B] in [0, t]: the mean velocity from t to t - interval is wanted. None: that at t.

        Returns:
          f32[B y x C], noise - data.
        """

    def denoise(self, x: jax.Array, t: jax.Array, condition: jax.Array, interval: jax.Array | None = None) -> jax.Array:
        """As a call with one condition dtype[B M E]; touches every parameter."""

    @staticmethod
    def flops(config: BackboneConfig, cells: int, condition: int) -> tuple[float, float]:
        """Floating-point operations on one row, for MFU and plans.

        Returns:
          Those of `encode_condition` on `condition` tokens, and those of one call on `cells` latent cells.
        """
