"""Modules of other names: importing an old one, or running it with `python -m`, is refused with the new one."""

MOVED = {
    "blip3o_jax.data.world": "blip3o_jax.demo.source",
    "blip3o_jax.data.world_tokenizer": "blip3o_jax.demo.tokenizer",
    "blip3o_jax.embedded": "blip3o_jax.demo.embedded",
    "blip3o_jax.presets": "blip3o_jax.config.presets",
    "blip3o_jax.world": "blip3o_jax.demo.world (command: python -m blip3o_jax.demo)",
}


class Finder:
    """What Python asks for modules that nothing else has found."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> None:
        """Raises ImportError for a name that has moved."""
        if name in MOVED:
            raise ImportError(f"{name} has moved - expected {MOVED[name]} - change the name")
