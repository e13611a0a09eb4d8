"""A loop over blocks whose parameters are stacked, without a widened copy of the stack.

L blocks.

XLA on CPU widens what it slices from a bfloat16 array, and takes that out of loops: an ordinary scan over stacked
bfloat16 weights holds a float32 copy of all of them. There, as long as nothing is differentiated, a block's weights are
picked as integers (`nn/bits.py`) within the loop; gradients go through the ordinary scan.

A scan also stacks what its backward pass needs of every block. Small models on CPU spend a quarter of a training step
on that, and run unrolled.
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
      unroll: one copy of the program per block, not a loop: L times as long to compile, and nothing is stacked.

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

    if remat != "none":
        layer = jax.checkpoint(layer, policy=POLICIES[remat], prevent_cse=unroll)
    stacked = nn.meta.unbox(block.variables["params"]), inputs
    if unroll:
        return _one_by_one(layer, depth, stacked, carry, shared)
    narrow = any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(stacked))
    run = _as_integers if narrow and jax.default_backend() == "cpu" else _ordinary
    return run(layer, stacked, carry, shared)


def _one_by_one(layer: Callable, depth: int, stacked: Any, carry: Any, shared: Any) -> tuple[Any, Any]:
    leaves, structure = jax.tree.flatten(stacked)
    rows = [_unstack(leaf) for leaf in leaves]
    outputs = []
    for i in range(depth):
        carry, output = layer(carry, *structure.unflatten([row[i] for row in rows]), shared)
        outputs.append(output)
    return carry, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)


@jax.custom_vjp
def _unstack(leaf: jax.Array) -> tuple[jax.Array, ...]:
    """Elements of the first axis. Left to itself, the gradient would be a sum of L stacks, of zeros but for one."""
    return tuple(leaf[i] for i in range(leaf.shape[0]))


_unstack.defvjp(lambda leaf: (_unstack(leaf), None), lambda _, gradients: (jnp.stack(gradients),))


def _ordinary(layer: Callable, stacked: Any, carry: Any, shared: Any) -> tuple[Any, Any]:
    return jax.lax.scan(lambda carry, own: layer(carry, *own, shared), carry, stacked)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _as_integers(layer: Callable, stacked: Any, carry: Any, shared: Any) -> tuple[Any, Any]:
    def step(carry, i):
        held, i = jax.lax.optimization_barrier((stacked, i))  # not to be widened outside the loop
        own = from_bits(jax.tree.map(lambda leaf: leaf[i], to_bits(held)))
        carry, output = layer(carry, *own, shared)
        return carry, to_bits(output)

    carry, outputs = jax.lax.scan(step, carry, jnp.arange(len(jax.tree.leaves(stacked)[0])))
    return carry, from_bits(outputs)


def _forward(layer, stacked, carry, shared):
    return jax.vjp(functools.partial(_ordinary, layer), stacked, carry, shared)


def _backward(layer, vjp, cotangents):
    return vjp(cotangents)


_as_integers.defvjp(_forward, _backward)
