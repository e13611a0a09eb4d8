"""What the backward pass recomputes."""

import flax.linen as nn
import jax

POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rematerialized(module: type[nn.Module], policy: str) -> type[nn.Module]:
    """The module class with the rematerialisation `policy` (none | full | dots); its parameters keep their names."""
    if policy == "none":
        return module
    return nn.remat(module, policy=POLICIES[policy], prevent_cse=False)
