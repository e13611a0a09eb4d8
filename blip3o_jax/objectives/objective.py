"""What an objective is: the record that the composition root and the plan read."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.train.step import LossFn
from blip3o_jax.types import Batch, Params

MakeParams = Callable[[jax.Array], Params]


def _no_fields(model: Blip3oConfig, max_references: int, precomputed: bool) -> tuple[str, ...]:
    return ()


def _no_modules(model: Blip3oConfig, settings: Any) -> dict[str, MakeParams]:
    return {}


def _same(model: Blip3oConfig, settings: Any) -> Blip3oConfig:
    return model


def _given(
    model: Blip3oConfig, settings: Any, params: Params, frozen: Params, draw: Callable[[], Batch], key: jax.Array
) -> Params:
    return params


def _not_counted(model: Blip3oConfig, settings: Any, layout: Any, rows: int, trainable: Params) -> float | None:
    return None


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss with its settings, and what it needs beside the model. All functions are pure.

    Attributes:
      Settings: frozen dataclass that reads the section `settings` of a configuration.
      make: (model, settings) -> the loss function of `train.step`.
      geometry: (model, settings) -> the model that the stage trains, where it is another than that of its start; leaves
        that the start lacks are fresh.
      fields: (model, max_references, precomputed) -> optional fields of `types.Batch` that the loss reads; none where
        it learns from rollouts.
      extra_modules: (model, settings) -> parameters of this stage alone: name -> function of a key that makes them,
        annotated with their axes.
      copied: name of `extra_modules` -> path of the model's parameters that it starts as a copy of.
      first_parameters: (model, settings, trainable, frozen, draw_batch, key) -> trainable parameters before the first
        step; called in fresh runs only.
      flops_per_step: (model, settings, layout, rows, shapes of what trains) -> floating-point operations of one update
        over all rows; None: not counted.
    """

    Settings: type
    make: Callable[[Blip3oConfig, Any], LossFn]
    geometry: Callable[[Blip3oConfig, Any], Blip3oConfig] = _same
    fields: Callable[[Blip3oConfig, int, bool], tuple[str, ...]] = _no_fields
    extra_modules: Callable[[Blip3oConfig, Any], dict[str, MakeParams]] = _no_modules
    copied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    first_parameters: Callable[[Blip3oConfig, Any, Params, Params, Callable[[], Batch], jax.Array], Params] = _given
    flops_per_step: Callable[[Blip3oConfig, Any, Any, int, Params], float | None] = _not_counted
