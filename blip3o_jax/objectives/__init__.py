"""Training objectives, one file each, and the table of their names in configurations."""

from blip3o_jax.objectives import autoencoder, flow_grpo, grpo, joint, matching, mean_flow, tokenizer
from blip3o_jax.objectives.objective import Objective, images_only

OBJECTIVES: dict[str, Objective] = {
    "autoencoder": Objective(
        Settings=autoencoder.Settings,
        make=autoencoder.make,
        fields=images_only("target_pixels"),
        extra_modules=autoencoder.extra_modules,
        flops_per_step=autoencoder.flops_per_step,
    ),
    "tokenizer": Objective(
        Settings=tokenizer.Settings,
        make=tokenizer.make,
        fields=images_only("target_tokenizer_pixels"),
        extra_modules=tokenizer.extra_modules,
        copied=tokenizer.COPIED_MODULES,
        first_parameters=tokenizer.first_parameters,
        flops_per_step=tokenizer.flops_per_step,
    ),
    "joint": Objective(
        Settings=joint.Settings, make=joint.make, fields=joint.fields, flops_per_step=joint.flops_per_step
    ),
    "mean_flow": Objective(
        Settings=mean_flow.Settings,
        make=mean_flow.make,
        geometry=mean_flow.geometry,
        fields=joint.fields,
        extra_modules=mean_flow.extra_modules,
        copied=mean_flow.COPIED_MODULES,
        first_parameters=mean_flow.first_parameters,
    ),
    "grpo": Objective(
        Settings=grpo.Settings,
        make=grpo.make,
        extra_modules=grpo.extra_modules,
        copied=grpo.COPIED_MODULES,
        flops_per_step=grpo.flops_per_step,
    ),
    "flow_grpo": Objective(
        Settings=flow_grpo.Settings,
        make=flow_grpo.make,
        extra_modules=flow_grpo.extra_modules,
        copied=flow_grpo.COPIED_MODULES,
    ),
    "nft": Objective(
        Settings=matching.NftSettings,
        make=matching.nft,
        extra_modules=matching.extra_modules,
        copied=matching.COPIED_MODULES,
    ),
    "awm": Objective(
        Settings=matching.AwmSettings,
        make=matching.awm,
        extra_modules=matching.extra_modules,
        copied=matching.COPIED_MODULES,
    ),
}
"""Name -> objective; configurations may also give `package.module:attribute`."""

__all__ = ["OBJECTIVES", "Objective"]
