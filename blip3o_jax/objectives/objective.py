"""The interface of an objective: its settings, its loss, and what it adds to the model and to the data."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.errors import call_custom, require, type_of
from blip3o_jax.train.step import LossFn, Scheduled
from blip3o_jax.types import Batch, Params

MakeParams = Callable[[jax.Array], Params]


def images_only(field: str) -> Callable[[Blip3oConfig, int, bool], tuple[str, ...]]:
    """Returns `Objective.fields` of an objective that reads images from one field of `types.Batch`."""

    def fields(model: Blip3oConfig, max_references: int, precomputed: bool) -> tuple[str, ...]:
        require(
            not precomputed, "row.precomputed", "True", "images, which this objective encodes itself", "set it to False"
        )
        return (field,)

    return fields


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss with its settings and requirements. All functions are pure.

    Attributes:
      Settings: frozen dataclass of the configuration section `settings`.
      make: (model, settings) -> loss function, see `train.step`.
      geometry: (model, settings) -> geometry that is trained, if it differs from that of the initial checkpoint;
        parameters missing from the checkpoint are initialised.
      fields: (model, max_references, precomputed) -> optional fields of `types.Batch` that the loss reads; empty for
        objectives trained on rollouts.
      extra_modules: (model, settings) -> name -> function that initialises, from a key, the boxed parameters of a
        module used by this objective only.
      copied: name of an extra module -> path of the model parameters that it is initialised from.
      first_parameters: (model, settings, trainable, frozen, draw_batch, key) -> initial trainable parameters; called in
        new runs only.
      flops_per_step: (model, settings, layout, rows, shapes of trainable parameters) -> floating-point operations of
        one update over all rows; None if not counted.
    """

    Settings: type
    make: Callable[[Blip3oConfig, Any], LossFn]
    geometry: Callable[[Blip3oConfig, Any], Blip3oConfig] = lambda model, settings: model
    fields: Callable[[Blip3oConfig, int, bool], tuple[str, ...]] = lambda model, max_references, precomputed: ()
    extra_modules: Callable[[Blip3oConfig, Any], dict[str, MakeParams]] = lambda model, settings: {}
    copied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    first_parameters: Callable[[Blip3oConfig, Any, Params, Params, Callable[[], Batch], jax.Array], Params] = (
        lambda model, settings, trainable, *others: trainable
    )
    flops_per_step: Callable[[Blip3oConfig, Any, Any, int, Params], float | None] = lambda *inputs: None


def _fits(made: Any, trainable: Params) -> bool:
    return jax.tree.map(type_of, made) == jax.tree.map(type_of, trainable)


RETURNS: dict[str, tuple[Callable[..., bool], str]] = {
    "make": (lambda made, *_: callable(made), "a loss function"),
    "geometry": (lambda made, *_: isinstance(made, Blip3oConfig), "a Blip3oConfig"),
    "fields": (lambda made, *_: isinstance(made, tuple | list), "a tuple of fields of types.Batch"),
    "extra_modules": (lambda made, *_: isinstance(made, Mapping), "a dictionary of functions"),
    "first_parameters": (
        lambda made, *inputs: _fits(made, inputs[2]),
        "the parameters it was given, with other values",
    ),
    "flops_per_step": (lambda made, *_: made is None or isinstance(made, int | float), "a number or None"),
}
"""Function of an objective -> whether it may have returned a value for its arguments, and what is expected."""


def checked(objective: Objective, what: str) -> Objective:
    """Returns an objective whose functions, and loss, raise UserError if they raise or return what they should not.

    Raises:
      UserError: its settings are not a dataclass.
    """
    settings = objective.Settings
    good = isinstance(settings, type) and dataclasses.is_dataclass(settings)
    require(good, f"{what}: Settings", type_of(settings), "a frozen dataclass", "correct it")

    def checked_loss(loss: LossFn) -> LossFn:
        if isinstance(loss, Scheduled):
            at = functools.partial(call_custom, f"{what}: loss", loss.at)
            return Scheduled(lambda *inputs: checked_loss(at(*inputs)), checked_loss(loss.held_out))
        return functools.partial(call_custom, f"{what}: loss", loss)

    def wrapped(name: str, function: Callable) -> Callable:
        def call(*inputs: Any) -> Any:
            made, (good, expected) = call_custom(f"{what}: {name}", function, *inputs), RETURNS[name]
            require(good(made, *inputs), f"{what}: {name}", f"{type_of(made)} back", expected, "correct it")
            return checked_loss(made) if name == "make" else made

        return call

    own = {name: getattr(objective, name) for name in RETURNS}
    own = {name: function for name, function in own.items() if function is not getattr(Objective, name, None)}
    return dataclasses.replace(objective, **{name: wrapped(name, function) for name, function in own.items()})
