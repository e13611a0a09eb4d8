"""Applies conversion tables: verifies that a checkpoint fits a model, loads it shard by shard, and exports it.

`plan` verifies both directions and reports all problems at once: every leaf of the parameter tree is filled exactly
once, and every tensor of the checkpoint is used exactly once or is unused for a stated reason. Transforms only reorder
elements, so a window of a leaf corresponds to a window of its tensors: `load` reads what the devices of its process
hold, one leaf at a time.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.convert.rules import TRANSFORMS, Rule, pattern
from blip3o_jax.convert.sources import Tensor, TensorInfo, TensorSource
from blip3o_jax.convert.tables import Part
from blip3o_jax.errors import require
from blip3o_jax.treepath import flatten, unflatten

SHOWN = 6  # most items that a message lists
BLOCK_COLUMNS = 32  # of a transposed matrix that are copied at a time


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of the parameter tree and the tensors that fill it."""

    path: str  # path from the root, such as `a/b/kernel`
    shape: tuple[int, ...]
    dtype: np.dtype  # represents the tensors exactly
    keys: tuple[str, ...]  # tensor names; for a stacked leaf, one per index of the leading axis
    stacked: bool  # the leading axis stacks tensors
    rule: Rule

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each tensor."""
        element = self.shape[1:] if self.stacked else self.shape
        return TRANSFORMS[self.rule.transform].inverse(np.broadcast_to(np.int8(0), element)).shape


@dataclasses.dataclass(frozen=True)
class Plan:
    """A verified assignment of the tensors of a checkpoint to the leaves of a parameter tree."""

    leaves: tuple[Leaf, ...]
    unused: Mapping[str, str]  # unused tensor -> reason
    aliases: Mapping[str, str]  # tensor that duplicates another one -> that one


def expand(abstract: Any, parts: Mapping[str, Part]) -> tuple[Leaf, ...]:
    """Returns the leaves of a parameter tree, dictionaries of shapes by part, with the tensors that fill them."""
    leaves = []
    for path, value in flatten(abstract).items():
        value = nn.meta.unbox(value)
        part, inner = path.split("/", 1)
        found = [(rule, match) for rule in parts[part].rules if (match := pattern(rule.target).fullmatch(inner))]
        assert len(found) == 1, f"{path}: {len(found)} rules of the conversion table give it, expected one"
        rule, match = found[0]
        stack, names = rule.stack_names, [match.groupdict()]
        if stack:
            names = [names[0] | {stack[0]: i} for i in range(value.shape[0])]
        keys = tuple(parts[part].prefix + rule.source.format(**values) for values in names)
        leaves.append(Leaf(path, tuple(value.shape), np.dtype(value.dtype), keys, bool(stack), rule))
    filled = [key for leaf in leaves for key in leaf.keys]
    assert len(filled) == len(set(filled)), "two leaves are made of the same tensor"
    return tuple(leaves)


def plan(
    abstract: Any,
    info: Mapping[str, TensorInfo],
    parts: Mapping[str, Part],
    aliases: Mapping[str, str] | None = None,
    where: str = "checkpoint",
) -> Plan:
    """Verifies that the tensors of a checkpoint fill a parameter tree.

    Args:
      abstract: part -> nested dictionaries of shapes; tensors of other parts are unused.
      aliases: tensor that duplicates another one -> that one.

    Raises:
      UserError: tensors are missing, unknown, of another shape or not floating point; the message lists all kinds.
    """
    aliases = dict(aliases or {})
    leaves = []
    for leaf in expand(abstract, parts):
        kinds = {info[key].dtype for key in leaf.keys if key in info}
        leaves.append(dataclasses.replace(leaf, dtype=kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)))
    expected = {key: leaf for leaf in leaves for key in leaf.keys}
    missing = [key for key in expected if key not in info]
    wrong = [text for key, leaf in expected.items() if key in info and (text := _mismatch(key, leaf, info[key]))]
    reasons = {key: _reason(key, abstract, parts) for key in info if key not in expected and key not in aliases}
    unknown = [key for key, reason in reasons.items() if reason is None]
    found = {"missing": missing, "of another shape or type": wrong, "unknown": unknown}
    count = sum(map(len, found.values()))
    problems = "; ".join(f"{kind}: {listed(keys)}" for kind, keys in found.items() if keys)
    what = f"{where}: {count} of its tensors do not fit the configuration ({problems})"
    do = "check that weights and config.json are of one checkpoint"
    require(not count, what, None, "every tensor of the model once", do)
    return Plan(tuple(leaves), reasons, aliases)


def load(
    plan: Plan,
    source: TensorSource,
    shardings: Any = None,
    param_dtype: str | None = None,
    check_finite: bool = True,
) -> dict[str, Any]:
    """Returns a parameter tree, loaded leaf by leaf. A process reads only the windows that its devices hold.

    Args:
      shardings: tree of shardings from `sharding.shardings_of`; None, for the tree or a leaf: one device.
      param_dtype: dtype of the leaves; None: as stored.

    Raises:
      UserError: a tensor contains NaN or infinities.
    """
    placed = {} if shardings is None else flatten(shardings)
    arrays = {}
    for leaf in plan.leaves:
        dtype = jnp.dtype(param_dtype or leaf.dtype)
        arrays[leaf.path] = _load_leaf(leaf, source, placed.get(leaf.path), dtype, check_finite)
        for key in leaf.keys:
            source[key].release()
    return unflatten(arrays)


def read_window(
    leaf: Leaf, index: Sequence[slice], source: TensorSource, dtype: np.dtype, check_finite: bool = True
) -> np.ndarray:
    """Reads a window of a leaf, one slice of step 1 per dimension, from the corresponding window of its tensors."""
    bounds = [part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True)]
    window = [slice(start, max(start, stop)) for start, stop in bounds]
    out = _aligned_empty(tuple(part.stop - part.start for part in window), dtype)
    if not leaf.stacked:
        _copy(out, _tensor_window(leaf, leaf.keys[0], window, source, check_finite))
        return out
    for row, key in zip(out, leaf.keys[window[0]], strict=True):
        _copy(row, _tensor_window(leaf, key, window[1:], source, check_finite))
        source[key].release()
    return out


def export_tensors(
    leaves: Sequence[Leaf], fetch: Callable[[str], np.ndarray], dtypes: Mapping[str, np.dtype]
) -> dict[str, Tensor]:
    """Returns the tensors of a parameter tree in the released layout. Only the last leaf is cached, so read in order.

    Args:
      leaves: result of `expand`, or leaves of a plan.
      fetch: path -> leaf on the host.
      dtypes: tensor -> its dtype; default: the dtype of its leaf in `leaves`.
    """
    fetched = functools.lru_cache(maxsize=1)(fetch)

    def read(leaf: Leaf, index: int, dtype: np.dtype) -> np.ndarray:
        value = fetched(leaf.path)
        tensor = TRANSFORMS[leaf.rule.transform].inverse(value[index] if leaf.stacked else value)
        out = np.empty(tensor.shape, dtype)
        _copy(out, tensor)
        return out

    tensors = {}
    for leaf in leaves:
        for index, key in enumerate(leaf.keys):
            dtype = np.dtype(dtypes.get(key, leaf.dtype))
            tensors[key] = Tensor(leaf.tensor_shape, dtype, leaf.path, functools.partial(read, leaf, index, dtype))
    return tensors


def listed(items: Sequence[str]) -> str:
    """Joins the first items, and says how many more there are."""
    return ", ".join(items[:SHOWN]) + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")


def _mismatch(key: str, leaf: Leaf, got: TensorInfo) -> str | None:
    if got.shape != leaf.tensor_shape:
        return f"{key} got {list(got.shape)} expected {list(leaf.tensor_shape)}"
    if not jnp.issubdtype(got.dtype, jnp.floating) or got.dtype.itemsize > 4:
        return f"{key} got {got.dtype} expected at most float32"
    return None


def _reason(key: str, abstract: Any, parts: Mapping[str, Part]) -> str | None:
    """Why a tensor that no leaf is made of may be kept aside; None if it may not."""
    name = max((name for name in parts if key.startswith(parts[name].prefix)), key=lambda name: len(parts[name].prefix))
    inner = key.removeprefix(parts[name].prefix)
    for unused in parts[name].unused:
        if re.fullmatch(unused.source, inner):
            return unused.reason
    rules = [rule for rule in parts[name].rules if rule.match(inner) is not None]
    if rules and name not in abstract:
        return f"the configuration has no {name}"
    return next((rule.surplus for rule in rules), None)


def _load_leaf(leaf: Leaf, source: TensorSource, sharding: Any, dtype: np.dtype, check_finite: bool) -> jax.Array:
    if sharding is None:
        return jax.device_put(read_window(leaf, (slice(None),) * len(leaf.shape), source, dtype, check_finite))
    windows: dict[tuple, np.ndarray] = {}

    def window(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        if key not in windows:
            windows[key] = read_window(leaf, index, source, dtype, check_finite)
        return windows[key]

    return jax.make_array_from_callback(leaf.shape, sharding, window, dtype=dtype)


def _tensor_window(
    leaf: Leaf, key: str, window: Sequence[slice], source: TensorSource, check_finite: bool
) -> np.ndarray:
    """Reads the part of a tensor that fills `window` of a leaf (of one layer if stacked), in the layout of the leaf."""
    transform = TRANSFORMS[leaf.rule.transform]
    tensor = source[key].read()
    element = leaf.shape[1:] if leaf.stacked else leaf.shape
    axes = range(len(element)) if transform.source_axes is None else transform.source_axes
    chosen, rest = [slice(None)] * tensor.ndim, [slice(None)] * len(element)
    for axis, (part, source_axis) in enumerate(zip(window, axes, strict=True)):
        if source_axis is None:
            rest[axis] = part
        else:
            block = tensor.shape[source_axis] // element[axis] if element[axis] else 1
            chosen[source_axis] = slice(part.start * block, part.stop * block)
    piece = tensor[tuple(chosen)]
    bad = count_nonfinite(piece) if check_finite else 0
    what = f"tensor {key} in {source[key].origin}: {bad} of {piece.size} values are NaN or infinite"
    do = "fetch the checkpoint again, or load it with check_finite=False"
    require(not bad, what, None, "finite weights", do)
    return transform.forward(piece)[tuple(rest)]


def count_nonfinite(x: np.ndarray) -> int:
    """Counts NaN and infinities. The common case of none is decided from the largest bit patterns of either sign, which
    is faster than `np.isfinite` for bfloat16."""
    info = jnp.finfo(x.dtype)
    if x.size and x.itemsize > 1:
        infinity = ((1 << info.nexp) - 1) << info.nmant
        most, least = (x.view(f"{kind}{x.itemsize}").max() for kind in "iu")
        if most < infinity and least < infinity + (1 << (info.bits - 1)):
            return 0
    return int((~np.isfinite(x.astype(np.float32))).sum())


def _copy(out: np.ndarray, x: np.ndarray) -> None:
    """Copies and casts `x` to `out`; a transposed matrix by blocks, since neither side should stride through memory."""
    if x.ndim != 2 or x.strides[0] >= x.strides[1]:
        out[...] = x
        return
    for start in range(0, x.shape[1], BLOCK_COLUMNS):
        out[:, start : start + BLOCK_COLUMNS] = x[:, start : start + BLOCK_COLUMNS]


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype, alignment: int = 64) -> np.ndarray:
    """Returns an empty array whose alignment lets the CPU backend use it without a copy."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(count + alignment, np.uint8)
    start = -memory.ctypes.data % alignment
    return memory[start : start + count].view(dtype).reshape(shape)
