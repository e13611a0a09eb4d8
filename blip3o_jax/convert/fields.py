"""JSON objects of configuration files, with checked access to their fields."""

import pathlib
import typing
from collections.abc import Mapping
from typing import Any

from blip3o_jax import files
from blip3o_jax.config.schema import convert_value
from blip3o_jax.errors import UserError

SCHEDULER = "scheduler_config.json"  # that of diffusers may contain infinities


class Fields(dict):
    """A JSON object of the file `path`, or nested in it; missing fields and those of another type raise UserError."""

    def __init__(self, path: pathlib.Path, values: Mapping[str, Any] | None = None):
        """Takes the object from `values`, or reads the file if they are None."""
        if values is None:
            values = files.read_json(path, "configuration", nan="kept" if path.name == SCHEDULER else "refused")
        super().__init__(values)
        self.path = path

    @classmethod
    def optional(cls, path: pathlib.Path) -> "Fields":
        """Reads a file; returns an empty object if it does not exist."""
        return cls(path, None if path.exists() else {})

    def __missing__(self, name: str):
        raise UserError(f"{self.path}: no {name}", expected="this field", do="fetch the checkpoint again")

    def typed(self, kind: type, name: str) -> Any:
        """Returns a required field of the given type."""
        return convert_value(kind, self[name], f"{self.path}.{name}")

    def get(self, name: str, default: Any = None) -> Any:
        """Returns a field of the type of `default` (None: any type), or `default` if it is missing or null."""
        if super().get(name) is None:
            return default
        return self[name] if default is None else self.typed(type(default), name)

    def fields_of(self, cls: type, names: Mapping[str, str]) -> dict[str, Any]:
        """Returns values for a configuration class; `names` maps its fields to those of the file.

        Raises:
          UserError: a value is missing, of the wrong type or out of range; the message has its name in the file.
        """
        hints = typing.get_type_hints(cls, include_extras=True)
        return {name: convert_value(hints[name], self[field], f"{self.path}.{field}") for name, field in names.items()}

    def section(self, name: str) -> "Fields":
        """Returns a nested object; empty if it is missing."""
        return Fields(pathlib.Path(f"{self.path}.{name}"), self.get(name, {}))
