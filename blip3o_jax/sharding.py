"""Maps logical axis names to mesh axes: the only place that decides how the model is laid out on devices.

Modules name the axes of parameters and activations; LOGICAL_RULES maps the names to the mesh axes `data`, `fsdp` and
`tensor`. A dimension that its mesh axes do not divide is replicated.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from blip3o_jax.errors import UserError, nearest, require

AXES = ("data", "fsdp", "tensor")

LOGICAL_RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "layers": (),
    "conv_in": (),
    "conv_out": ("fsdp",),
    # activations
    "batch": ("data", "fsdp"),
    "length": (),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
}


def make_mesh(shape: dict[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh with the axes `data`, `fsdp` and `tensor`.

    Args:
      shape: size per axis; a missing axis is 1, one axis may be -1 (the remaining devices). Default: all on `fsdp`.
      devices: default: all devices of all processes.

    Raises:
      UserError: an unknown axis, or sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = {"fsdp": -1} if shape is None else dict(shape)
    for axis in shape:
        if axis not in AXES:
            do = nearest(axis, AXES, "correct it")
            raise UserError(f"mesh.{axis}: unknown axis", expected=f"sizes for {', '.join(AXES)}", do=do)
    sizes = [shape.get(axis, 1) for axis in AXES]
    good = all(type(size) is int and (size == -1 or size >= 1) for size in sizes) and sizes.count(-1) <= 1
    require(good, "mesh", shape, f"sizes for {', '.join(AXES)}, at most one of them -1", "correct it")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    require(
        math.prod(sizes) == len(devices),
        "mesh",
        shape,
        f"sizes whose product is {len(devices)}, the devices",
        "change one",
    )
    return jax.make_mesh(tuple(sizes), AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def default_mesh() -> Mesh | None:
    """Makes the default mesh of all devices; None for a single device."""
    return make_mesh() if jax.device_count() > 1 else None


@contextlib.contextmanager
def use_mesh(mesh: Mesh | None):
    """Sets the mesh that `constrain` and sharded parameters refer to; None: a single device."""
    if mesh is None:
        yield
    else:
        with jax.set_mesh(mesh):
            yield


def spec_of(names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """Returns the partition of an array with logical axis `names`, without mesh axes that do not divide it."""
    entries, used = [], set()
    for name, size in zip(names, shape, strict=True):
        axes, parts = [], 1
        for axis in () if name is None else LOGICAL_RULES[name]:
            extent = mesh.shape[axis]
            if extent > 1 and axis not in used and size % (parts * extent) == 0:
                axes.append(axis)
                parts *= extent
        used.update(axes)
        entries.append(tuple(axes) if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*entries)


def shardings_of(abstract: Any, mesh: Mesh | None) -> Any:
    """Returns the shardings of a tree of annotated shapes, such as the result of `jax.eval_shape(module.init, ...)`.

    Returns:
      The same tree without boxes, a NamedSharding per leaf (None per leaf without a mesh).
    """

    def leaf_sharding(leaf):
        if mesh is None:
            return None
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else (None,) * leaf.ndim
        return NamedSharding(mesh, spec_of(names, nn.meta.unbox(leaf).shape, mesh))

    return jax.tree.map(leaf_sharding, abstract, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))


def sharded_shapes(abstract: Any, mesh: Mesh | None, dtype: Any = None) -> Any:
    """Returns annotated shapes as plain ones with their shardings, in `dtype` if given."""

    def plain(leaf, layout):
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=layout)

    return jax.tree.map(plain, nn.meta.unbox(abstract), shardings_of(abstract, mesh))


def batch_shape(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Returns the shape of an array whose leading axis is split over the batch axes of the mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh, len(shape), shape[0]))


def batch_sharding(mesh: Mesh, ndim: int, size: int) -> NamedSharding:
    """Returns the sharding of an array whose leading axis is split over the batch axes of the mesh."""
    return NamedSharding(mesh, spec_of(("batch",) + (None,) * (ndim - 1), (size,) + (1,) * (ndim - 1), mesh))


def batch_devices(mesh: Mesh) -> int:
    """Returns the number of shards of a batch."""
    return math.prod(mesh.shape[axis] for axis in LOGICAL_RULES["batch"])


def reader(mesh: Mesh | None) -> tuple[int, int]:
    """Returns which part of every global batch this process reads; processes that hold the same rows read the same.

    Returns:
      Index of the part, in row order, and the number of parts.

    Raises:
      UserError: two processes share only some of their rows.
    """
    if mesh is None:
        return 0, 1
    axes = [mesh.axis_names.index(axis) for axis in LOGICAL_RULES["batch"]]
    held: dict[int, set[tuple[int, ...]]] = {}
    for place, device in np.ndenumerate(mesh.devices):
        held.setdefault(device.process_index, set()).add(tuple(place[axis] for axis in axes))
    parts = sorted({tuple(sorted(places)) for places in held.values()})
    if len({len(part) for part in parts}) > 1 or sum(map(len, parts)) > batch_devices(mesh):
        raise UserError(
            "mesh",
            got=f"{dict(mesh.shape)} over {len(held)} processes, some of which share a part of their rows",
            expected="processes that share all of their rows or none",
            do="let tensor divide the devices of a process, or be a multiple of them",
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def check_rows(rows: int, mesh: Mesh | None, accumulation: int = 1, what: str = "batch") -> None:
    """Raises UserError, named `what`, if batch axes of the mesh and micro-batches do not divide the rows of a batch.

    Without a mesh nothing is checked.
    """
    if mesh is None:
        return
    parts = batch_devices(mesh) * accumulation
    expected = f"a multiple of {parts}, devices of the batch axes x accumulation"
    require(rows % parts == 0, what, f"{rows} rows", expected, "change the batch size, the mesh or the accumulation")


def shard_batch(batch: Any, mesh: Mesh | None, accumulation: int = 1) -> Any:
    """Puts the rows of this process on its devices, as a part of the global batch.

    Args:
      batch: tree of arrays with leading rows, the part of this process according to `reader`; equal on all in size.
      mesh: None for the default device.

    Returns:
      The tree of global arrays, with rows sharded over the batch axes of the mesh.

    Raises:
      UserError: the batch axes of the mesh and the micro-batches do not divide the rows.
    """
    if mesh is None:
        return jax.device_put(batch)
    _, parts = reader(mesh)

    def layout_of(leaf):
        rows = leaf.shape[0] * (1 if isinstance(leaf, jax.Array) else parts)
        check_rows(rows, mesh, accumulation)
        return batch_sharding(mesh, leaf.ndim, rows)

    def put(leaf, layout):
        if isinstance(leaf, jax.Array):
            return jax.device_put(leaf, layout)
        return jax.make_array_from_process_local_data(layout, leaf)

    layouts = jax.tree.map(layout_of, batch)
    return jax.device_put(batch, layouts) if jax.process_count() == 1 else jax.tree.map(put, batch, layouts)


def fetch(array: jax.Array | np.ndarray | None) -> np.ndarray | None:
    """Fetches the whole array to the host; to be called by all processes."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return None if array is None else np.asarray(array)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains the sharding of an activation by its logical axis names; no effect without a mesh in scope."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(names, x.shape, mesh))


def gather(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains a parameter with logical axis `names` to be whole along `fsdp`; `tensor` still shards it."""
    return constrain(x, *(name if LOGICAL_RULES.get(name) == ("tensor",) else None for name in names))


def shard_bytes(tree: Any) -> int:
    """Returns the bytes per device of a tree of shapes with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def split_rows(leaf: jax.Array, parts: int) -> jax.Array:
    """[B ...] -> [A B/A ...]; part i holds the rows i, A + i, 2A + i, ..., so that no row leaves its device."""
    leaf = leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:]).swapaxes(0, 1)
    return constrain(leaf, None, "batch", *(None,) * (leaf.ndim - 2))


def join_rows(leaf: jax.Array) -> jax.Array:
    """[A B/A ...] -> [B ...]; inverts `split_rows`."""
    leaf = leaf.swapaxes(0, 1).reshape(-1, *leaf.shape[2:])
    return constrain(leaf, "batch", *(None,) * (leaf.ndim - 1))


def map_rows(function: Callable[[Any], Any], rows: Any, at_a_time: int) -> Any:
    """Applies a row-wise function to a few rows per device at a time, to save memory.

    Args:
      function: tree of arrays [B ...] -> tree of arrays [B ...].
      at_a_time: most rows per device, at least 1; the largest divisor of their number is taken.
    """
    mesh, count = jax.sharding.get_abstract_mesh(), jax.tree.leaves(rows)[0].shape[0]
    devices = 1 if mesh.empty else batch_devices(mesh)
    own = count // devices
    if own <= at_a_time or count % devices:
        return function(rows)
    together = devices * max(size for size in range(1, at_a_time + 1) if own % size == 0)
    split = jax.tree.map(lambda leaf: split_rows(leaf, count // together), rows)
    return jax.tree.map(join_rows, jax.lax.map(function, split))


def shares_rows_only(rows: int) -> bool:
    """Whether each device of the mesh in scope holds equally many of a batch's `rows` and whole activations of them."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == batch_devices(mesh) and rows % mesh.size == 0


def on_own_rows(function: Callable, whole: Any, *rows: Any) -> Any:
    """Computes `function(whole, *rows)` on every device for its own rows; the devices share the rows only.

    For kernels that XLA cannot partition.

    Args:
      function: returns a tree of arrays [B ...].
      whole: tree of arrays, the same for all rows.
      rows: trees of arrays [B ...], or of scalars that hold for all rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(whole, *rows)
    split = PartitionSpec(LOGICAL_RULES["batch"])
    specs = jax.tree.map(lambda leaf: split if leaf.ndim else PartitionSpec(), rows)
    own = jax.shard_map(function, in_specs=(PartitionSpec(), *specs), out_specs=split, check_vma=False)
    return own(whole, *rows)
