"""Neural networks: pure Linen modules that take one frozen configuration, and their composition in `blip3o`."""
