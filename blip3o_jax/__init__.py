"""BLIP3o-NEXT in JAX: one model that generates and edits images."""

from blip3o_jax.version import __version__

__all__ = ["Pipeline", "__version__"]


def __getattr__(name: str):
    """Imports the pipeline, and with it jax, on first use, so that data workers do not import jax."""
    if name == "Pipeline":
        from blip3o_jax.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
