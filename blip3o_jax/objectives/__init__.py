"""Training objectives, one file each, and the table of their names in configurations."""

from blip3o_jax.objectives import autoencoder, flow_grpo, grpo, grpo_nft, joint, matching, mean_flow, tokenizer
from blip3o_jax.objectives.objective import Objective

OBJECTIVES: dict[str, Objective] = {
    "autoencoder": autoencoder.OBJECTIVE,
    "tokenizer": tokenizer.OBJECTIVE,
    "joint": joint.OBJECTIVE,
    "mean_flow": mean_flow.OBJECTIVE,
    "grpo": grpo.OBJECTIVE,
    "flow_grpo": flow_grpo.OBJECTIVE,
    "nft": matching.NFT,
    "awm": matching.AWM,
    "grpo_nft": grpo_nft.OBJECTIVE,
}
"""Name -> objective; configurations may also give `package.module:attribute`."""

__all__ = ["OBJECTIVES", "Objective"]
