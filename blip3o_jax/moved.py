"""Renamed modules: importing an old name returns the new module, with a deprecation warning."""

import importlib
import importlib.machinery
import sys
import warnings

MOVED = {
    "blip3o_jax.data.world": "blip3o_jax.demo.source",
    "blip3o_jax.data.world_tokenizer": "blip3o_jax.demo.tokenizer",
    "blip3o_jax.embedded": "blip3o_jax.demo.embedded",
    "blip3o_jax.presets": "blip3o_jax.config.presets",
    "blip3o_jax.world": "blip3o_jax.demo.world",
}


class Finder:
    """An import finder for old module names."""

    @staticmethod
    def find_spec(name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        """Returns the specification of a module that has moved, itself or with its package."""
        old = next((old for old in MOVED if name == old or name.startswith(f"{old}.")), None)
        return old and importlib.machinery.ModuleSpec(name, _Loader(MOVED[old] + name.removeprefix(old)))


class _Loader:
    """Loads the renamed module in place of the old one."""

    def __init__(self, name: str):
        self._name = name

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Uses the default module, which stays empty."""

    def exec_module(self, module) -> None:
        """Replaces the module in `sys.modules`, which Python then returns."""
        sys.modules[module.__name__] = importlib.import_module(self._name)
        warnings.warn(f"{module.__name__} is {self._name} now", DeprecationWarning, stacklevel=2)

    def get_code(self, name: str) -> None:
        """Refuses `python -m` of the old name."""
        command = "blip3o_jax.demo" if name == "blip3o_jax.world" else self._name
        raise ImportError(f"{name} has moved - expected python -m {command} - change the name")
