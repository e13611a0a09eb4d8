"""Both halves at once: GRPO for the decoder and DiffusionNFT for the diffusion transformer, on the same rollouts.

A sample is a set of image tokens and the image rendered from it. Its reward becomes one advantage, from which both
halves learn. The hidden states that condition the transformer are constants: those of the decoder that sampled.

Source: `grpo` and `matching`.
"""

import dataclasses
from collections.abc import Callable

import jax

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.schema import Weight
from blip3o_jax.objectives import grpo, matching
from blip3o_jax.objectives.objective import Objective
from blip3o_jax.train.step import LossTerm
from blip3o_jax.types import GrpoNftRollout, Metrics, Params

PREFIX = "nft_"  # of the terms and metrics of the diffusion half


@dataclasses.dataclass(frozen=True)
class Settings(grpo.Settings):
    """Settings of GRPO, and those of DiffusionNFT for the diffusion half."""

    draws: matching.Draws = 4  # noise levels per image
    velocity_beta: Weight = 1e-4  # as `beta` of `nft`: weight of the distance from the reference's velocity
    nft_beta: matching.Strength = 1.0
    advantage_range: matching.Strength = 5.0

    @property
    def painting(self) -> matching.NftSettings:
        """Settings of the diffusion half."""
        return matching.NftSettings(
            draws=self.draws, beta=self.velocity_beta, nft_beta=self.nft_beta, advantage_range=self.advantage_range
        )


def make(model: Blip3oConfig, settings: Settings) -> Callable:
    """Returns the loss function; parameters: those of both objectives."""
    tokens, painting = grpo.make(model, settings), matching.nft(model, settings.painting)

    def loss(params: Params, batch: GrpoNftRollout, keys: jax.Array) -> tuple[dict[str, LossTerm], Metrics]:
        terms, metrics = tokens(params, batch, keys)
        for whole, part in zip((terms, metrics), painting(params, batch, keys), strict=True):
            whole |= {PREFIX + name: value for name, value in part.items()}
        return terms, metrics

    return loss


def extra_modules(model: Blip3oConfig, settings: Settings) -> dict[str, Callable[[jax.Array], Params]]:
    """Returns the initialisers of the references of both halves."""
    return grpo.extra_modules(model, settings) | matching.extra_modules(model, settings.painting)


OBJECTIVE = Objective(
    Settings, make, extra_modules=extra_modules, copied={**grpo.OBJECTIVE.copied, **matching.NFT.copied}
)
