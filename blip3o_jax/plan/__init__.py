"""What a training step needs, before anything is allocated: `python -m blip3o_jax.plan`."""
