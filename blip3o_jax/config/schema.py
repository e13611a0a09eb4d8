"""Strict conversion of nested dictionaries to frozen dataclasses, with checks of keys, types and ranges.

The type of a field declares its values: `Annotated[int, Range(1, 8)]` is a number in a range, `Annotated[str,
OneOf("a", "b")]` one of several names, `Annotated[str, Named(TABLE)]` a row of a table or `package.module:attribute`,
`Annotated[Base, Variant(TABLE, default)]` a section whose `name` selects its class. Floats must be finite in float32.
"""

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from blip3o_jax.config import registry
from blip3o_jax.errors import UserError, nearest, require

FLOAT32_MAX = float.fromhex("0x1.fffffep+127")

# Rules that a value must satisfy: `check(value, where)` raises UserError otherwise, `where` names the value.


@dataclasses.dataclass(frozen=True)
class Range:
    """Inclusive bounds of a number."""

    low: float = -math.inf
    high: float = math.inf

    def check(self, value: float, where: str) -> None:
        if not self.low <= value <= self.high:
            low, high = (f"{bound:,}" if isinstance(bound, int) else f"{bound:g}" for bound in (self.low, self.high))
            rounded = isinstance(self.high, float) and float(high) != self.high  # such as 1 - 1e-7
            expected = f"{low} to {high}" if not rounded else f"{low} or more, and below {high}"
            expected = f"{low} or more" if self.high == math.inf else expected
            raise UserError(where, got=value, expected=expected, do="choose a value in this range")


class OneOf:
    """A fixed set of names, or of truth values."""

    def __init__(self, *names: str | bool):
        self.names = names

    def check(self, value: str | bool, where: str) -> None:
        require(value in self.names, where, repr(value), " | ".join(map(str, self.names)), "choose one")


class Named:
    """The name of a row of a table, or `package.module:attribute`."""

    def __init__(self, table: Iterable[str]):
        self.table = table

    def check(self, value: str, where: str) -> None:
        registry.check_name(self.table, value, where)


class Filled:
    """A non-empty text."""

    def check(self, value: str, where: str) -> None:
        require(value.strip(), where, repr(value), "a name", "write one")


class Variant:
    """A section whose `name`, a row of a table or `package.module:attribute`, selects the class that reads it.

    The class is the attribute `Config` of what the name resolves to.
    """

    def __init__(self, table: Mapping[str, Any], default: str):
        self.table, self.default = table, default

    def config_class(self, base: type, section: Any, where: str) -> type:
        """Returns the dataclass, derived from `base`, that reads a section; raises UserError if there is none."""
        name = section.get("name", self.default) if isinstance(section, dict) else self.default
        name = convert_value(str, name, f"{where}.name")
        found = getattr(registry.resolve(self.table, name, f"{where}.name"), "Config", None)
        if not (isinstance(found, type) and issubclass(found, base)):
            expected = f"a class whose attribute Config derives from {base.__name__}"
            raise UserError(f"{where}.name {name}", got=f"Config {found!r}", expected=expected, do="define it")
        return found


Natural = Annotated[int, Range(0, 2**31 - 1)]
Count = Annotated[int, Range(1, 2**31 - 1)]
Depth = Annotated[int, Range(1, 1024)]  # layers
Width = Annotated[int, Range(1, 2**20)]  # channels, heads
Size = Annotated[int, Range(1, 2**15)]  # pixels
Seed = Annotated[int, Range(0, 2**32 - 1)]
Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(1e-30, 1e30)]
Epsilon = Annotated[float, Range(1e-12, 0.1)]  # epsilon of a norm
Weight = Annotated[float, Range(0, 1e6)]  # weight of a loss term
Text = Annotated[str, Filled()]
Dtype = Annotated[str, OneOf("float32", "bfloat16")]
Remat = Annotated[str, OneOf("none", "full", "dots")]  # what is recomputed backward; dots: all but matrix products


def from_dict(cls: type, values: dict[str, Any], where: str = "") -> Any:
    """Builds a frozen configuration from nested dictionaries.

    Args:
      values: field name -> value. Lists become tuples, integers become floats where needed. A sequence of sections may
        also be a mapping, name -> section, read in the order of the names.
      where: dotted path of `values`, for messages.

    Raises:
      UserError: an unknown key (the nearest is suggested), a missing key, or a value of the wrong type or out of range.
    """
    if not isinstance(values, dict):
        expected = f"a mapping for {cls.__name__}"
        raise UserError(where or "configuration", got=repr(values), expected=expected, do="nest its fields")
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in fields:
            do = nearest(str(key), fields, f"known: {', '.join(sorted(fields))}")
            raise UserError(f"{prefix}{key}: unknown key", expected="a known one", do=do)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        require(not required or name in values, f"{prefix}{name}: missing", None, _type_name(hints[name]), "add it")
    return cls(**{key: convert_value(hints[key], value, f"{prefix}{key}") for key, value in values.items()})


def to_dict(config: Any) -> dict[str, Any]:
    """Returns the nested dictionary that `from_dict` reads back."""
    return dataclasses.asdict(config)


def checked(config: Any, where: str = "") -> Any:
    """Validates a configuration that was not built by `from_dict`, and returns it."""
    return from_dict(type(config), to_dict(config), where)


def differences(got: Any, expected: Any, where: str = "") -> dict[str, tuple[Any, Any]]:
    """Returns the fields in which two configurations of one class differ: dotted name -> both values.

    Sections of different classes differ as a whole. Names are prefixed by `where`.
    """
    found = {}
    for field in dataclasses.fields(expected):
        name, pair = f"{where}{field.name}", (getattr(got, field.name), getattr(expected, field.name))
        if dataclasses.is_dataclass(pair[0]) and type(pair[0]) is type(pair[1]):
            found.update(differences(*pair, f"{name}."))
        elif pair[0] != pair[1]:
            found[name] = pair
    return found


def with_dtype(
    config: Any,
    dtype: str | None = None,
    param_dtype: str | None = None,
    remat: str | None = None,
    unroll: bool | None = None,
) -> Any:
    """Returns the configuration with the given numerics in every section that has such fields."""
    changes = {}
    wanted = {"dtype": dtype, "param_dtype": param_dtype, "remat": remat, "unroll": unroll}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = with_dtype(value, **wanted)
        elif wanted.get(field.name) is not None:
            changes[field.name] = wanted[field.name]
    return dataclasses.replace(config, **changes)


def convert_value(hint: Any, value: Any, where: str) -> Any:
    """Converts a value to the type `hint` of a field, by the rules of `from_dict`.

    Raises:
      UserError: a value of the wrong type or out of range; `where` names it.
    """
    origin = typing.get_origin(hint)
    if origin is Annotated:
        hint, *rules = typing.get_args(hint)
        if isinstance(rules[0], Variant):
            return convert_value(rules[0].config_class(hint, value, where), value, where)
        value = convert_value(hint, value, where)
        for rule in rules:
            rule.check(value, where)
        return value
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return convert_value(next(option for option in options if option is not type(None)), value, where)
    if origin is tuple and isinstance(value, dict) and dataclasses.is_dataclass(typing.get_args(hint)[0]):
        kind = typing.get_args(hint)[0]
        return tuple(convert_value(kind, value[name], f"{where}.{name}") for name in sorted(value, key=str))
    if origin is tuple and isinstance(value, (list, tuple)):
        hints = typing.get_args(hint)
        hints = hints[:1] * len(value) if hints[-1] is Ellipsis else hints
        require(len(hints) == len(value), where, f"{len(value)} values", f"{len(hints)}, {hint}", "correct them")
        return tuple(convert_value(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(hints, value)))
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        require(abs(value) <= FLOAT32_MAX, where, value, "a number that is finite in float32", "correct it")
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    require(value is not None, f"{where}: not set", None, _type_name(hint), "give it a value")
    raise UserError(where, got=f"{value!r}", expected=_type_name(hint), do="change its type")


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    return getattr(hint, "__name__", str(hint))
