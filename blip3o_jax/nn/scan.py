"""A loop over blocks whose parameters are stacked, without a widened copy of the stack.

L blocks.

XLA on CPU widens what it slices from a bfloat16 array, and takes that out of loops: an ordinary scan over stacked
bfloat16 weights holds a float32 copy of all of them. There, as long as nothing is differentiated, a block's weights are
picked as integers (`nn/bits.py`) within the loop; gradients go through the ordinary scan.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.nn.bits import from_bits, to_bits

POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def scan_blocks(
    block: nn.Module,
    function: Callable[..., tuple[Any, Any]],
    carry: Any,
    inputs: Any,
    *shared: Any,
    depth: int,
    remat: str = "none",
    unroll: bool = False,
) -> tuple[Any, Any]:
    """Runs `function(block, carry, inputs, *shared) -> (carry, output)` for one block after the other.

    Args:
      block: submodule of the caller; its parameters are stacked on a leading axis L by this function.
      function: closes over no traced arrays: everything that gradients are wanted of is an argument.
      carry: tree of arrays, of the first block.
      inputs: tree of arrays with leading axis L, one element for each block.
      shared: trees of arrays that all blocks receive.
      depth: L.
      remat: what the backward pass recomputes: none | full (everything) | dots (all but matrix products).
      unroll: one copy of the program per block, not a loop.

    Returns:
      The carry after the last block, and the outputs with leading axis L.
    """
    if block.is_initializing():
        scanned = nn.scan(
            function,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0,) + (nn.broadcast,) * len(shared),
            length=depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(block, carry, inputs, *shared)
    free = block.clone(parent=None, name=None)

    def layer(carry, params, inputs, shared):
        return free.apply({"params": params}, carry, inputs, *shared, method=function)

    stacked = nn.meta.unbox(block.variables["params"]), inputs
    ordinary = functools.partial(_ordinary, layer, remat, unroll)
    narrow = any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(stacked))
    if not narrow or jax.default_backend() != "cpu":
        return ordinary(stacked, carry, shared)
    return _as_integers(layer, ordinary, unroll, stacked, carry, shared)


def _ordinary(layer: Callable, remat: str, unroll: bool, stacked: Any, carry: Any, shared: Any) -> tuple[Any, Any]:
    def step(carry, own):
        return layer(carry, *own, shared)

    if remat != "none":
        step = jax.checkpoint(step, policy=POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(step, carry, stacked, unroll=unroll)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _as_integers(layer: Callable, ordinary: Callable, unroll: bool, stacked: Any, carry: Any, shared: Any):
    def step(carry, i):
        held, i = jax.lax.optimization_barrier((stacked, i))  # not to be widened outside the loop
        own = from_bits(jax.tree.map(lambda leaf: leaf[i], to_bits(held)))
        carry, output = layer(carry, *own, shared)
        return carry, to_bits(output)

    carry, outputs = jax.lax.scan(step, carry, jnp.arange(len(jax.tree.leaves(stacked)[0])), unroll=unroll)
    return carry, from_bits(outputs)


def _forward(layer, ordinary, unroll, stacked, carry, shared):
    return jax.vjp(ordinary, stacked, carry, shared)


def _backward(layer, ordinary, unroll, vjp, cotangents):
    return vjp(cotangents)


_as_integers.defvjp(_forward, _backward)
