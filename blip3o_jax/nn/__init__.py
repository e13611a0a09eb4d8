"""Layers that two or more models share: plain Linen modules and functions, no model configuration."""
