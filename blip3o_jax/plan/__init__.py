"""Memory and compute of a training step, before anything is allocated: `python -m blip3o_jax.plan`."""
