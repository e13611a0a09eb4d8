"""Checks of a recording of the reference, by part of the model."""
