"""Splits parameters into trainable and frozen ones, by the rules `trainable` or with an adapter.

An adapter is added to the linear layers whose kernel `trainable` selects, and nothing else trains. The reference policy
of an objective is then the model without the adapter, not a copy.
"""

import dataclasses
import re
from collections.abc import Mapping

import flax.linen as nn
import jax
import numpy as np

from blip3o_jax import lora, treepath
from blip3o_jax.convert import adapters
from blip3o_jax.errors import UserError, require
from blip3o_jax.experiment.config import AdapterConfig, ExperimentConfig
from blip3o_jax.experiment.start import Parameters, Start
from blip3o_jax.models import blip3o
from blip3o_jax.sharding import fetch
from blip3o_jax.train.step import Reparametrise, TrainState, identity
from blip3o_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Split:
    """Trainable and frozen parameters, as annotated shapes."""

    trainable: Params
    frozen: Params
    sites: Mapping[str, lora.Site] = dataclasses.field(default_factory=dict)  # layers of the adapter, if there is one
    reparametrise: Reparametrise = identity  # see `train.step`

    def load_frozen(self, loaded: Parameters, dtype: str, mesh: jax.sharding.Mesh | None) -> Params:
        """Returns the values of the frozen parameters."""
        if not self.sites:
            return loaded.select(self.frozen, dtype)
        return treepath.merge(loaded.select(lora.without(self.frozen), dtype), lora.scales(self.sites, mesh))


def split(config: ExperimentConfig, start: Start) -> Split:
    """Splits the parameters of a run. With an adapter, copies of the model that its objective needs are not stored.

    Raises:
      UserError: nothing trains, or the adapter has no linear layers or extends a model that the checkpoint lacks.
    """
    adapter, spared = config.adapter, {}
    if adapter.enabled and config.reference_from is None:
        copies = start.objective.copied.items()
        spared = {name: part for name, part in copies if name in start.shapes and part in adapters.ADAPTED}
    model = {name: tree for name, tree in start.shapes.items() if name not in spared}
    trainable, frozen = treepath.partition(model, config.trainable)
    require(bool(trainable), "trainable", "no parameter that trains", "at least one", "change the rules")
    if not adapter.enabled:
        return Split(trainable, frozen)
    _check_base(start)
    kernels = treepath.flatten(trainable)
    layers = [path for path in adapters.linear_layers(start.model) if f"{path}/kernel" in kernels]
    sites = {path: site for path in layers if (site := _site(adapter, path, kernels[f"{path}/kernel"])).rank}
    if not sites:
        raise UserError(
            "adapter",
            got=f"{len(layers)} linear layers that `trainable` names, none of which its rules adapt",
            expected=f"layers of {', '.join(adapters.ADAPTED)}",
            do="change trainable or adapter.rules, or set adapter.rank to 0",
        )
    shapes = lora.shapes(sites, {path: kernels[f"{path}/kernel"] for path in sites})
    constants = {f"{path}/lora_scale": jax.ShapeDtypeStruct(own.scale.shape, np.float32) for path, own in sites.items()}
    frozen = treepath.merge(model, treepath.unflatten(constants))
    return Split(shapes, frozen, sites, lora.with_references(spared) if spared else identity)


def _site(adapter: AdapterConfig, path: str, kernel: nn.LogicallyPartitioned) -> lora.Site:
    """Returns the adapter of a layer: rank and alpha of the first matching rule, else the defaults."""
    default = (adapter.rank, adapter.alpha)
    rank, alpha = next((rule[1:] for rule in adapter.rules if re.search(rule[0], path)), default)
    *lead, rows, columns = nn.meta.unbox(kernel).shape
    what = f"adapter.rank of {path}"
    require(rank <= min(rows, columns), what, rank, f"at most {min(rows, columns)}, the smaller side of its kernel")
    depth = lead[0] if lead else 1
    alphas = (float(rank if alpha is None else alpha),) * depth
    return lora.Site((rank,) * depth, alphas, bool(lead), adapter.rslora, adapter.dora)


def _check_base(start: Start) -> None:
    """Raises UserError if the checkpoint is not the complete model that the adapter applies to."""
    if start.opened is None:
        return
    fresh = [part for part in blip3o.modules(start.model) if not start.loads(part)]
    if fresh or start.model.edit != start.opened.config.edit:
        raise UserError(
            "adapter",
            got=f"a model with {', '.join(fresh) or 'another editing mode'} beside that of init_from",
            expected="the model of the checkpoint",
            do="train this stage without an adapter first",
        )


def adapter_of(config: ExperimentConfig, parts: Split, state: TrainState) -> lora.Adapter:
    """Fetches the adapter of a state to the host, in the dtype of the activations."""
    trained = treepath.flatten(state.ema if config.export_ema else state.params)
    dtype = jax.numpy.dtype(config.numerics.dtype)
    return lora.Adapter(parts.sites, {path: fetch(leaf).astype(dtype) for path, leaf in trained.items()})
