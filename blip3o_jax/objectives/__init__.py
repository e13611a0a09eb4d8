"""What each stage of training minimises: one file per objective."""

from blip3o_jax.objectives import joint

OBJECTIVES = {"joint": joint}
"""Objective name -> module; configurations name the objective of their stage."""
