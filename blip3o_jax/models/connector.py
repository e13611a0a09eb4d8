"""Two-layer projection: decoder states or reference latents to the DiT's condition, image features to embeddings.

D input width, E output width. Source: BLIP3o-NEXT `diffusion_connector` (two linear layers, tanh-GELU between,
RMSNorm with eps 1e-5 last).
Differs from the reference:
1. The initial scale of the norm is a field of the configuration; the reference sets it in some places only.
2. Condition dropout is in `models/blip3o.py`.
"""

import flax.linen as nn
import jax

from blip3o_jax.config import ConnectorConfig
from blip3o_jax.nn.linear import Linear
from blip3o_jax.nn.norm import RMSNorm
from blip3o_jax.nn.parameters import numerics


class Connector(nn.Module):
    """[... D] -> dtype[... E]."""

    config: ConnectorConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, kind = self.config, numerics(self.config)
        x = jax.nn.gelu(Linear(c.width, ("embed", "mlp"), name="hidden", **kind)(x), approximate=True)
        x = Linear(c.width, ("mlp", "embed"), name="out", **kind)(x)
        return RMSNorm(1e-5, axis="embed", gain=c.gain, name="norm", **kind)(x)
