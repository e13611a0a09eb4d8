"""Peak rates of devices, and the work of a row, for the fraction of the machine that a row uses.

Rates are the vendors' for dense products in bfloat16 and for device memory, per chip as jax counts devices.
"""

import jax
import numpy as np
from workload import Workload

from blip3o_jax import flops
from blip3o_jax.models import blip3o

# part of the device's kind, in lower case: (TFLOP/s in bfloat16, GB/s); the first match counts
PEAKS = {
    "b200": (2250, 8000),
    "h200": (989, 4800),
    "h100 pcie": (756, 2000),
    "h100": (989, 3350),
    "a100-sxm4-40gb": (312, 1555),
    "a100": (312, 2039),
    "l4": (121, 300),
    "tpu v6": (918, 1640),
    "tpu v5p": (459, 2765),
    "tpu v5": (197, 819),  # v5e calls itself "TPU v5 lite"
    "tpu v4": (275, 1228),
}


def peaks(kind: str) -> tuple[float, float] | None:
    """FLOP/s in bfloat16 and bytes/s of a device, None if it is not in the table."""
    found = [rates for name, rates in PEAKS.items() if name in kind.lower()]
    return (found[0][0] * 1e12, found[0][1] * 1e9) if found else None


def work(workload: Workload) -> dict[str, float]:
    """Floating-point operations of the rows that are one kind of work."""
    config, inputs = workload.config, workload.inputs
    states = 1 + config.num_image_tokens
    encode, denoise = flops.dit(config, config.latent_size**2, states)
    prefill = {
        name: flops.decoder(config.decoder, len(prompt))
        for name, prompt in (("prefill", inputs.prompt), ("prefill, 1 reference", inputs.edit_prompt))
    }
    size = config.image_size
    return prefill | {
        "tokenizer encode": flops.image_tokenizer(config),
        "DiT": 2 * workload.steps * denoise + encode,
        "autoencoder encode": flops.autoencoder(config, "encode", size, size),
        "autoencoder decode": flops.autoencoder(config, "decode", size, size),
    }


def decode_bytes(workload: Workload) -> float:
    """Bytes that decoding must read: weights of the layers, image rows of the head, and the cache as it grows."""
    config = workload.config
    shapes = jax.tree.leaves(blip3o.abstract_plain(config)["decoder"]["layers"])
    weights = sum(np.prod(leaf.shape) for leaf in shapes) + config.tokens.num_image_tokens * config.decoder.width
    per_position = 2 * config.decoder.depth * config.decoder.num_kv_heads * config.decoder.head_dim
    cache = per_position * (len(workload.inputs.prompt) + workload.tokens / 2)
    return workload.tokens * float(weights + cache) * (2 if workload.dtype == "bfloat16" else 4)
