"""Counts floating-point operations of the model's parts from their geometry, for MFU and plans.

A product of [m k] and [k n] counts 2 m k n; only matrix products and convolutions count.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blip3o_jax.config import Blip3oConfig, DecoderConfig, ViTConfig
from blip3o_jax.errors import require, type_of
from blip3o_jax.models import blip3o


def decoder(config: DecoderConfig, length: int) -> float:
    """Counts the decoder layers on one row of `length` tokens; causal attention counts half."""
    heads = config.num_heads * config.head_dim
    projections = config.width * (2 * heads + 2 * config.num_kv_heads * config.head_dim + 3 * config.mlp_dim)
    return config.depth * (2.0 * length * projections + 2.0 * length * length * heads)


def head(config: DecoderConfig, length: int) -> float:
    """Counts the output projection on `length` tokens."""
    return 2.0 * length * config.width * config.vocab_size


def image_head(model: Blip3oConfig) -> float:
    """Counts the image rows of the output projection on the tokens of one image."""
    return 2.0 * model.num_image_tokens * model.decoder.width * model.tokens.num_image_tokens


def vit(config: ViTConfig, length: int) -> float:
    """Counts a vision tower on `length` patches."""
    patch = config.in_channels * config.patch_size**2 * config.width
    layer = 2.0 * length * config.width * (4 * config.width + 2 * config.mlp_dim) + 4.0 * length**2 * config.width
    return 2.0 * length * patch + config.depth * layer


def dit(model: Blip3oConfig, cells: int, condition: int) -> tuple[float, float]:
    """Counts the diffusion backbone: encoding `condition` tokens, and one denoising step of `cells` latent cells."""
    made = blip3o.backbone(model).flops(model.dit, cells, condition)
    good = isinstance(made, tuple) and len(made) == 2 and all(isinstance(count, int | float) for count in made)
    require(good, f"backbone {model.dit.name}: flops", type_of(made), "a tuple of 2 numbers", "correct it")
    return made


def image_tokenizer(model: Blip3oConfig) -> float:
    """Counts encoding one image to codes, with a precomputed codebook."""
    config = model.image_tokenizer
    tokens = config.num_tokens()
    search = 2.0 * tokens * config.bottleneck_dim * (config.encoder.width + config.codebook_size)
    return vit(config.encoder, config.grid_size**2) + search


def autoencoder(model: Blip3oConfig, method: str, height: int, width: int) -> float:
    """Counts the method `encode` or `decode` of the autoencoder for one image of the given size in pixels."""
    config = model.autoencoder
    factor = config.spatial_factor
    shape = (
        (1, height, width, 3) if method == "encode" else (1, height // factor, width // factor, config.latent_channels)
    )
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), blip3o.abstract_plain(model))
    run = jax.jit(lambda params, x: blip3o.apply(model, params, "autoencoder", method, x))
    return float(run.lower(abstract, jax.ShapeDtypeStruct(shape, jnp.float32)).cost_analysis()["flops"])


def training_step(
    model: Blip3oConfig, layout: Any, rows: int, trainable: Mapping[str, Any], flow_draws: int = 1, flow_every: int = 1
) -> float:
    """Counts one joint training step over all rows, forward and backward.

    Besides its forward pass, a part counts once more for the gradient of its inputs, if it or a part before it trains,
    and once more for the gradient of its weights, times the fraction that trains. Encoders count their forward pass
    only. The decoder's head counts at every position, although the loss skips some.

    Args:
      trainable: shapes of the trainable parameters, by part.
      flow_draws: noise levels per image that the DiT is trained on.
      flow_every: the DiT is trained on every n-th row.
    """
    cells = model.latent_size**2
    reference = cells if model.edit.vae_condition else 0
    condition = 1 + model.num_image_tokens + reference
    encode, denoise = dit(model, cells * (2 if model.edit.vae_noise else 1), condition)
    forward = {
        "decoder": decoder(model.decoder, layout.length) + head(model.decoder, layout.length),
        "dit": (encode + flow_draws * denoise) / flow_every,
    }
    shapes = blip3o.abstract_plain(model)
    before = {"decoder": ("siglip_connector",), "dit": ("siglip_connector", "decoder", "connector", "vae_connector")}
    total = 0.0
    for part, cost in forward.items():
        size = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes[part]))
        trains = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(trainable.get(part, {})))
        reached = any(trainable.get(name) for name in (part, *before[part]))
        total += cost * (1 + reached + trains / size)
    tokenized = {"target_tokenizer_pixels": 1, "ref_tokenizer_pixels": layout.max_references}
    total += image_tokenizer(model) * sum(images for field, images in tokenized.items() if field in layout.fields)
    if encoded := {"target_pixels", "ref_pixels"}.intersection(layout.fields):
        total += autoencoder(model, "encode", layout.height, layout.width) * len(encoded)
    return rows * total
