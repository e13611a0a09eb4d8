"""What each stage of training minimises: one file per objective.

A module of the table has `Settings`, `make(model, settings) -> loss`, `extra_modules` (parameters of the stage alone)
with `COPIED_MODULES`, and `flops_per_step`; where it learns from data and not from rollouts, `fields` (what it reads of
a batch); where the first step needs other parameters than were made or loaded, `first_parameters`.
"""

from blip3o_jax.objectives import autoencoder, flow_grpo, grpo, joint, tokenizer

OBJECTIVES = {"autoencoder": autoencoder, "tokenizer": tokenizer, "joint": joint, "grpo": grpo, "flow_grpo": flow_grpo}
"""Objective name -> module; configurations name the objective of their stage."""
