"""A decoder layer on a few rows in five Triton kernels for NVIDIA GPUs, where kernel launches dominate decoding.

B batch, W new tokens of a row, R = B * W <= `ROWS`, D width, F features, N query heads, K key heads, G = N / K,
S cache slots, H head dimension. Rounds where the plain layer rounds, except that attention weights are normalised last.
Devices of a mesh that share the batch compute their own rows, with whole weights.
Written in Pallas for Triton, which jax 0.12 deprecates; where jax lacks it, the plain layer runs.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from blip3o_jax import treepath
from blip3o_jax.nn.kernels import by_platform, rows_per_device
from blip3o_jax.sharding import on_own_rows, shares_rows_only
from blip3o_jax.types import Params

ROWS = 16  # rows of a tile, the least that tensor cores take; copies of the last row fill it up
DEPTH_TILE, SLOT_TILE = 128, 64
WIDE = 4096  # from this many features on, a program computes 32 of them instead of 16

LEAVES = {
    "attention_norm/scale", "attention/query/kernel", "attention/key/kernel", "attention/value/kernel",
    "attention/query_norm/scale", "attention/key_norm/scale", "attention/out/kernel",
    "mlp_norm/scale", "mlp/gate/kernel", "mlp/up/kernel", "mlp/down/kernel",
}  # fmt: skip

KeyValue = tuple[jax.Array, jax.Array]


def cached_layer(
    plain: Callable, params: Params, x: jax.Array, cos, sin, bias, past: KeyValue, slot: jax.Array, eps: float
) -> tuple[jax.Array, KeyValue]:
    """Computes `plain(params, x, cos, sin, bias, past, slot)`, by `layer` where it applies; arguments as there."""
    operands = (params, x, cos, sin, bias, past, slot)
    if not (takes(params, x, past) and shares_rows_only(len(x)) and at_hand()):
        return plain(*operands)
    fused = functools.partial(layer, eps=eps)
    return by_platform(*operands, cuda=lambda params, *rows: on_own_rows(fused, params, *rows), default=plain)


@functools.cache
def at_hand() -> bool:
    """Whether kernels for NVIDIA GPUs can be compiled here; avoids the slow import of Pallas elsewhere."""
    plugin = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    return plugin and importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def takes(params: Params, x: jax.Array, past: KeyValue) -> bool:
    """Whether `layer` supports the layer: kernels of fitting sizes in bfloat16 or int8, no adapters, no biases."""
    leaves = treepath.flatten(params)
    scales = {path for path in leaves if path.endswith("/kernel_scale")}
    if leaves.keys() - scales != LEAVES:
        return False
    key = past[0]
    groups = params["attention"]["query"]["kernel"].shape[1] // (key.shape[1] * key.shape[3])
    few = rows_per_device(x.shape[0]) * x.shape[1] <= ROWS and x.shape[1] * groups <= ROWS
    kernels = {path: leaf for path, leaf in leaves.items() if path.endswith("/kernel")}
    whole = all(size % DEPTH_TILE == 0 for kernel in kernels.values() for size in kernel.shape)
    others = [leaf for path, leaf in kernels.items() if f"{path}_scale" not in scales]
    bfloat16 = all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves((others, x, past)))
    return few and whole and bfloat16 and key.shape[3] in (64, 128)


def layer(
    params: Params,
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    bias: jax.Array,
    past: KeyValue,
    slot: jax.Array,
    eps: float,
    interpret: bool = False,
) -> tuple[jax.Array, KeyValue]:
    """Computes `models.decoder.Block` with a cache.

    Args:
      params: parameters of the block.
      x: bf16[B W D].
      cos, sin: f32[B W H/2].
      bias: f32[B 1 1 W S].
      past: keys and values bf16[B K S H], overwritten from `slot` on.
      slot: i32[] or i32[B].
      eps: of the norms.
      interpret: run Pallas in interpreter mode, for tests.

    Returns:
      bf16[B W D], and the updated keys and values.
    """
    attention, mlp = params["attention"], params["mlp"]
    product = functools.partial(_product, eps=eps, interpret=interpret)
    rows = x.reshape(-1, x.shape[-1])
    heads = product(rows, [attention[name] for name in ("query", "key", "value")], params["attention_norm"]["scale"])
    scales = attention["query_norm"]["scale"], attention["key_norm"]["scale"]
    slots = jnp.broadcast_to(slot, len(x))
    out, past = _attend(*heads, *scales, cos, sin, bias[:, 0, 0], *past, slots, eps=eps, interpret=interpret)
    (rows,) = product(out, [attention["out"]], added=rows)
    (hidden,) = product(rows, [mlp["gate"], mlp["up"]], params["mlp_norm"]["scale"], gated=True)
    (rows,) = product(hidden, [mlp["down"]], added=rows)
    return rows.reshape(x.shape), past


def _product(
    x: jax.Array,
    layers: Sequence[Params],
    norm: jax.Array | None = None,
    added: jax.Array | None = None,
    gated: bool = False,
    *,
    eps: float,
    interpret: bool,
) -> list[jax.Array]:
    """Computes `norm(x[R D]) @ kernel[D F] + added[R F]` of linear layers; if gated, silu(first) * second of two.

    Args:
      norm: [D], scale of the norm; None: no norm.
    """
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    features = [layer["kernel"].shape[1] for layer in layers]
    tile = 32 if sum(features) >= WIDE else 16
    outputs = features[:1] if gated else features

    def program(x, layers, norm, added, *outs):
        at = jnp.minimum(jnp.arange(ROWS), x.shape[0] - 1)[:, None]
        first = 0
        for which, out in enumerate(outs):
            place = pallas.program_id(0) - first
            first += outputs[which] // tile

            @pallas.when((place >= 0) & (place < outputs[which] // tile))
            def _(own=layers if gated else layers[which : which + 1], out=out, place=place):
                columns = place * tile + jnp.arange(tile)
                y, *more = _sums(x, at, norm, eps, own, columns)
                if gated:
                    y = (jax.nn.silu(y.astype(jnp.float32)) * more[0].astype(jnp.float32)).astype(y.dtype)
                if added is not None:
                    y = y + added[at, columns[None]]
                out[at, columns[None]] = y

    return pallas.pallas_call(
        program,
        grid=(sum(outputs) // tile,),
        out_shape=[jax.ShapeDtypeStruct((x.shape[0], width), x.dtype) for width in outputs],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=4),
        interpret=interpret,
        name="rows_times_kernel",
    )(x, layers, norm, added)


def _sums(x, at, norm, eps, layers, columns):
    """Returns bf16[ROWS tile] for every linear layer: products of the normalised rows with the given columns."""
    steps = x.shape[1] // DEPTH_TILE

    def depth(i):
        return i * DEPTH_TILE + jnp.arange(DEPTH_TILE)

    if norm is not None:

        def squares(i, total):
            return total + jnp.sum(jnp.square(x[at, depth(i)[None]].astype(jnp.float32)), axis=1)

        total = jax.lax.fori_loop(0, steps, squares, jnp.zeros(ROWS, jnp.float32))
        inverse = jax.lax.rsqrt(total / x.shape[1] + eps)[:, None]

    def add(i, sums):
        own = depth(i)
        rows = x[at, own[None]]
        if norm is not None:
            rows = (rows.astype(jnp.float32) * inverse).astype(rows.dtype) * norm[own][None].astype(rows.dtype)
        tiles = (layer["kernel"][own[:, None], columns[None]].astype(rows.dtype) for layer in layers)
        return tuple(y + jnp.dot(rows, tile, preferred_element_type=jnp.float32) for y, tile in zip(sums, tiles))

    zeros = jnp.zeros((ROWS, len(columns)), jnp.float32)
    sums = jax.lax.fori_loop(0, steps, add, (zeros,) * len(layers))
    scales = (layer["kernel_scale"][columns] if "kernel_scale" in layer else 1 for layer in layers)  # of int8
    return tuple((y * scale).astype(x.dtype) for y, scale in zip(sums, scales))


def _attend(query, key, value, query_scale, key_scale, cos, sin, bias, keys, values, slot, *, eps, interpret):
    """Attends to the cache: returns bf16[R N*H] and the updated caches [B K S H], from raw heads [R N*H], [R K*H]."""
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    batch, kv_heads, slots, width = keys.shape
    window, groups = cos.shape[1], query.shape[1] // (kv_heads * width)

    def program(query, key, value, query_scale, key_scale, cos, sin, bias, _, __, slot, out, keys, values):
        row, head = pallas.program_id(0), pallas.program_id(1)
        place = jnp.minimum(jnp.arange(ROWS), window * groups - 1)  # queries, grouped by token
        token = jnp.minimum(jnp.arange(ROWS), window - 1)
        column = (head * groups + place % groups)[:, None] * width
        turn = functools.partial(_normalised_and_turned, cos, sin, row, eps, width)
        query = turn(query, query_scale, row * window + place // groups, place // groups, column)
        new = turn(key, key_scale, row * window + token, token, head * width)
        full, half = jnp.arange(width)[None], jnp.arange(width // 2)[None]
        to = slot[row] + token[:, None]
        for part, offset in zip(new, (0, width // 2)):
            keys[row, head, to, half + offset] = part
        values[row, head, to, full] = value[(row * window + token)[:, None], head * width + full]
        if not interpret:
            triton.debug_barrier()

        def attend(i, state):
            most, total, mean = state
            seen = i * SLOT_TILE + jnp.arange(SLOT_TILE)
            at = jnp.minimum(seen, slots - 1)
            scores = sum(
                jnp.dot(part, keys[row, head, at[:, None], half + offset].T, preferred_element_type=jnp.float32)
                for part, offset in zip(query, (0, width // 2))
            )
            scores = scores * width**-0.5 + bias[row, (place // groups)[:, None], at[None]]
            scores = jnp.where(seen[None] < slots, scores, -jnp.inf)
            higher = jnp.maximum(most, jnp.max(scores, axis=1))
            weights, fade = jnp.exp(scores - higher[:, None]), jnp.exp(most - higher)
            part = jnp.dot(
                weights.astype(values.dtype), values[row, head, at[:, None], full], preferred_element_type=jnp.float32
            )
            return higher, total * fade + jnp.sum(weights, axis=1), mean * fade[:, None] + part

        empty = jnp.full(ROWS, -1e38, jnp.float32), jnp.zeros(ROWS), jnp.zeros((ROWS, width))
        _, total, mean = jax.lax.fori_loop(0, pallas.cdiv(slot[row] + window, SLOT_TILE), attend, empty)
        out[(row * window + place // groups)[:, None], column + full] = (mean / total[:, None]).astype(out.dtype)

    out, keys, values = pallas.pallas_call(
        program,
        grid=(batch, kv_heads),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, keys, values)],
        input_output_aliases={8: 1, 9: 2},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attend_to_cache",
    )(query, key, value, query_scale, key_scale, cos, sin, bias, keys, values, slot)
    return out, (keys, values)


def _normalised_and_turned(cos, sin, row, eps, width, heads, scale, at, token, column):
    """Applies RMS norm and rotary embedding to heads at rows `at`; returns their two halves bf16[ROWS H/2]."""
    half = jnp.arange(width // 2)
    halves = [heads[at[:, None], column + (half + offset)[None]].astype(jnp.float32) for offset in (0, width // 2)]
    inverse = jax.lax.rsqrt(sum(jnp.sum(jnp.square(x), axis=1) for x in halves) / width + eps)[:, None]
    first, second = (
        ((x * inverse).astype(heads.dtype) * scale[half + offset][None].astype(heads.dtype)).astype(jnp.float32)
        for x, offset in zip(halves, (0, width // 2))
    )
    cos, sin = (table[row, token[:, None], half[None]] for table in (cos, sin))
    return tuple(x.astype(heads.dtype) for x in (first * cos - second * sin, second * cos + first * sin))
