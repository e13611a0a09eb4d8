"""bfloat16 arrays moved as integers.

XLA on CPU widens what it slices from a bfloat16 array, and takes that out of loops: a scan over stacked layers would
hold a float32 copy of all of them. Integers are moved as they are. There is no gradient through this.
"""

from typing import Any

import jax
import jax.numpy as jnp


def to_bits(tree: Any) -> Any:
    """The tree with bfloat16 leaves as uint16 of the same bits."""
    return jax.tree.map(lambda x: jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x, tree)


def from_bits(tree: Any) -> Any:
    """The inverse of `to_bits`."""
    return jax.tree.map(lambda x: jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x, tree)
