"""Shapes of the batches of reinforcement learning, for planning without a model.

B rows, T prompt positions, R references, N image tokens, M = 1 + N states, D decoder width, F features' width,
y x latent cells, C latent channels, S denoising steps that are learned from.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from blip3o_jax import sharding
from blip3o_jax.config import Blip3oConfig
from blip3o_jax.types import FlowRollout, TokenRollout

MakeBatch = Callable[..., TokenRollout | FlowRollout]


def rows_of_prompt(samples: int, rows: int, mesh: Mesh | None, accumulation: int = 1) -> int:
    """How many rows in a row have one prompt and lie on one device, in every micro-batch: they share its reading.

    Args:
      samples: of a prompt, which follow each other.
      rows: B, a multiple of `samples`.
      mesh: devices; None for one.
      accumulation: micro-batches, laid out as `train.step` does it.
    """
    if samples % accumulation:
        return 1
    devices = 1 if mesh is None else sharding.batch_devices(mesh)
    return math.gcd(samples // accumulation, max(1, rows // (devices * accumulation)))


def batch_maker(objective: str, samples: int, rows: int, mesh: Mesh | None, accumulation: int) -> MakeBatch:
    """What makes an update's batch of its arrays; arguments as in `rows_of_prompt`."""
    if objective == "flow_grpo":
        return FlowRollout
    return functools.partial(TokenRollout, prompt_rows=rows_of_prompt(samples, rows, mesh, accumulation))


def abstract_batch(
    make: MakeBatch,
    objective: str,
    settings: Any,
    model: Blip3oConfig,
    rows: int,
    row_length: int,
    max_references: int,
) -> TokenRollout | FlowRollout:
    """Shapes of one update's batch, without what is only recorded of it.

    Args:
      make: of `batch_maker`.
      objective: a key of build.SAMPLERS.
      settings: of the objective.
      model: geometry.
      rows: B.
      row_length: T + N.
      max_references: R.
    """
    arrays = {"grpo": _tokens, "flow_grpo": _flow}[objective]
    return make(**arrays(settings, model, rows, row_length - model.num_image_tokens, max_references), facts={})


def _array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.dtype(dtype))


def _tokens(settings: Any, model: Blip3oConfig, B: int, T: int, R: int) -> dict[str, Any]:
    N, tokenizer = model.num_image_tokens, model.image_tokenizer
    features = _array("float32", B, R, N, tokenizer.encoder.width) if R and model.edit.siglip_features else None
    prompt = {
        name: _array(kind, B, T) for name, kind in (("tokens", "int32"), ("valid", "bool"), ("image_slot", "int32"))
    }
    return dict(
        **prompt,
        unguided=prompt if settings.token_guidance_scale != 1 else None,
        completion=_array("int32", B, N),
        mask=_array("bool", B, N),
        old_log_probs=_array("float32", B, N),
        advantage=_array("float32", B),
        kl_scale=_array("float32", B),
        ref_log_probs=_array("float32", B, N) if settings.beta else None,
        ref_codes=_array("int32", B, R, N) if R else None,
        ref_features=features,
    )


def _flow(settings: Any, model: Blip3oConfig, B: int, T: int, R: int) -> dict[str, Any]:
    del T, R
    side = model.latent_size
    latent = (side, side, model.autoencoder.latent_channels)
    takes_latents = model.edit.vae_condition or model.edit.vae_noise
    return dict(
        states=_array("float32", B, 1 + model.num_image_tokens, model.decoder.width),
        latents=_array("float32", B, 1 + settings.train_steps, *latent),
        old_log_probs=_array("float32", B, settings.train_steps),
        mask=_array("bool", B),
        advantage=_array("float32", B),
        kl_scale=_array("float32", B),
        ref_latent=_array("float32", B, *latent) if takes_latents else None,
        has_ref=_array("bool", B) if takes_latents else None,
    )
