"""Low-rank adapters of linear layers: LoRA, optionally rank-stabilised (rsLoRA) or weight-decomposed (DoRA).

L stacked layers (no such axis for a single layer), D input width, F output width, r rank.

The leaves of an adapter are stored beside the kernel: `lora_a` f32[L D r], `lora_b` f32[L r F], `lora_scale` f32[L],
and with DoRA `lora_magnitude` f32[L F]. `nn.linear.Linear` applies them without adding the change to the kernel, so
that frozen kernels need no gradients; `merge` adds it. Layers of a stack with lower ranks are padded with zeros.

Source: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732), DoRA (arXiv 2402.09353), numerically as in PEFT.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from blip3o_jax import treepath
from blip3o_jax.nn.linear import column_factors, column_norms
from blip3o_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Site:
    """The adapter of a linear layer or of a stack of layers."""

    ranks: tuple[int, ...]  # rank of every layer; 0: not adapted
    alphas: tuple[float, ...]  # alpha of every layer
    stacked: bool = True  # the leaves have a leading layer axis
    rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    dora: bool = False  # train column magnitudes

    @property
    def rank(self) -> int:
        """The largest rank, which the leaves have."""
        return max(self.ranks)

    @property
    def scale(self) -> np.ndarray:
        """f32[L] or f32[], the factor of the low-rank product."""
        roots = [rank**0.5 if self.rslora else rank for rank in self.ranks]
        scales = [alpha / root if root else 0.0 for alpha, root in zip(self.alphas, roots, strict=True)]
        return np.array(scales if self.stacked else scales[0], np.float32)

    @property
    def adapted(self) -> np.ndarray:
        """bool[L] or bool[]: which layers are adapted."""
        return np.array(self.ranks if self.stacked else self.ranks[0]) > 0


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter on the host or on devices."""

    sites: Mapping[str, Site]  # path of a layer -> its adapter
    leaves: Mapping[str, Any]  # path -> array: `lora_a`, `lora_b` and, with DoRA, `lora_magnitude` of every site


def shapes(sites: Mapping[str, Site], kernels: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the annotated shapes of an adapter's trainable leaves; `kernels` are annotated shapes by layer."""
    leaves = {}
    for path, site in sites.items():
        kernel = kernels[path]
        *lead, rows, columns = nn.meta.unbox(kernel).shape
        boxed = isinstance(kernel, nn.LogicallyPartitioned)
        *names, row, column = kernel.names if boxed else (None,) * len(nn.meta.unbox(kernel).shape)
        made = {"lora_a": ((*lead, rows, site.rank), (*names, row, None)),
                "lora_b": ((*lead, site.rank, columns), (*names, None, column))}  # fmt: skip
        made |= {"lora_magnitude": ((*lead, columns), (*names, column))} if site.dora else {}
        for name, (shape, axes) in made.items():
            leaves[f"{path}/{name}"] = nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), axes)
    return treepath.unflatten(leaves)


def first_values(sites: Mapping[str, Site], abstract: Params, frozen: Params, key: jax.Array) -> Params:
    """Initialises an adapter without effect: A uniform as in PEFT, B zero, magnitudes those of the kernels."""
    kernels, leaves = treepath.flatten(frozen), {}
    for path, leaf in treepath.flatten(abstract).items():
        layer, _, name = path.rpartition("/")
        leaf = nn.meta.unbox(leaf)
        if name == "lora_a":
            bound = leaf.shape[-2] ** -0.5
            own = jax.random.fold_in(key, sorted(sites).index(layer))
            leaves[path] = jax.random.uniform(own, leaf.shape, jnp.float32, -bound, bound)
        elif name == "lora_b":
            leaves[path] = jnp.zeros(leaf.shape, jnp.float32)
        else:
            leaves[path] = jax.jit(column_norms)(kernels[f"{layer}/kernel"])
    return treepath.unflatten(leaves)


def scales(sites: Mapping[str, Site], mesh: Mesh | None = None) -> Params:
    """Returns the `lora_scale` of every site, replicated over the mesh."""
    values = {f"{path}/lora_scale": site.scale for path, site in sites.items()}
    layout = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return treepath.unflatten(jax.jit(lambda: jax.tree.map(jnp.asarray, values), out_shardings=layout)())


def without(params: Params) -> Params:
    """Returns the parameters without the leaves of an adapter, without copying."""
    leaves = treepath.flatten(params)
    return treepath.unflatten({path: leaf for path, leaf in leaves.items() if "lora_" not in path.rpartition("/")[2]})


def with_references(copied: Mapping[str, str]) -> Callable[[Params], Params]:
    """Returns a reparametrisation that adds copies, name -> part, of parts without their adapter."""

    def add(params: Params) -> Params:
        return {**params, **{name: without({part: params[part]})[part] for name, part in copied.items()}}

    return add


def merge(params: Params, adapters: Sequence[tuple[Adapter, float]]) -> Params:
    """Merges adapters into the kernels, one after the other; dtypes and shardings stay.

    Kernels are computed in float32 and rounded once.

    Args:
      adapters: each with the factor of its change; as in PEFT it does not affect DoRA's magnitudes.
    """
    leaves, changes = treepath.flatten(params), collections.defaultdict(list)
    for adapter, weight in adapters:
        for path, site in adapter.sites.items():
            a, b, magnitude = (adapter.leaves.get(f"{path}/{name}") for name in ("lora_a", "lora_b", "lora_magnitude"))
            changes[f"{path}/kernel"].append((a, b, np.float32(weight) * site.scale, site.adapted, magnitude))
    changed = {path: _changed(leaves[path].sharding)(leaves[path], own) for path, own in changes.items()}
    return treepath.unflatten(leaves | changed)


@functools.cache
def _changed(layout: Any) -> Callable[..., jax.Array]:
    @functools.partial(jax.jit, out_shardings=layout)
    def changed(kernel, changes):
        whole = kernel.astype(jnp.float32)
        for a, b, scale, adapted, magnitude in changes:
            new = whole + scale[..., None, None] * low_rank(a, b)
            if magnitude is not None:
                new = new * column_factors(magnitude, new)[..., None, :]
            whole = jnp.where(adapted[..., None, None], new, whole)
        return whole.astype(kernel.dtype)

    return changed


def low_rank(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the product f32[L D F] of `lora_a` and `lora_b`."""
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
