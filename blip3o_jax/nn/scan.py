"""A scan over blocks with stacked parameters.

The scan stacks the residuals of every block for the backward pass. That costs small models on CPU a quarter of a
training step, so these run unrolled.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip3o_jax.nn.kernels import is_split, scan_layers, unstack

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
    """Runs `function(block, carry, inputs, *shared) -> (carry, output)` for each of L blocks in turn.

    Args:
      block: submodule of the caller; its parameters are stacked on a leading axis L by this function. Split ones
        (`split`) run one after the other, as with `unroll`.
      function: must not close over traced arrays; pass whatever needs gradients as an argument.
      carry: tree of arrays, input of the first block.
      inputs: tree of arrays with leading axis L, one element per block; or of lists of L arrays.
      shared: trees of arrays passed to all blocks.
      depth: L.
      remat: what the backward pass recomputes: none | full (everything) | dots (all except matrix products).
      unroll: emit one copy of the program per block instead of a loop: L times as long to compile, nothing stacked.

    Returns:
      The carry after the last block, and the outputs with leading axis L, or split if the parameters are.
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
    apart = any(map(is_split, jax.tree.leaves(stacked, is_leaf=is_split)))
    if not (unroll or apart):
        return scan_layers(layer, stacked, carry, shared)
    outputs = []
    for own in unstack(stacked):
        carry, output = layer(carry, *own, shared)
        outputs.append(output)
    return carry, jax.tree.map(lambda *parts: list(parts) if apart else jnp.stack(parts), *outputs)


def split(stacked: Any) -> Any:
    """Replaces every array [L ...] of a tree of stacks by a list of L arrays, which `scan_blocks` takes as well.

    What is split already is returned as it is.
    """
    return jax.tree.map(lambda leaf: leaf if is_split(leaf) else list(leaf), stacked, is_leaf=is_split)
