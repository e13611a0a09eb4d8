"""The presets have moved."""

raise ImportError("blip3o_jax.presets - expected blip3o_jax.config.presets - change the import")
