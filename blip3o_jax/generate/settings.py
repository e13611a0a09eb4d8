"""How pictures are made: the settings of a run, and the checks that need no weights."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.schema import from_dict
from blip3o_jax.diffusion.samplers import SAMPLERS
from blip3o_jax.errors import UserError
from blip3o_jax.generate import prompts
from blip3o_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Settings:
    """How pictures are made; the names are those of diffusers' pipelines and of sample.py."""

    negative_prompt: str | None = None
    height: int | None = None  # pixels; default: the size the model was trained on
    width: int | None = None
    num_inference_steps: int = 30
    guidance_scale: float = 2.0  # of the diffusion half; 1 turns guidance off
    token_guidance_scale: float | None = None  # of the image tokens; default: the checkpoint's for the task
    num_images_per_prompt: int = 1
    seed: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 1200  # 0 keeps all
    top_p: float = 0.95
    batch_size: int = 8  # pictures at a time
    sampler: str = "euler"
    image_ids_only: bool = True
    tiling: bool = False  # encode and decode large pictures in tiles

    def __post_init__(self):
        def check(name, good, expected):
            if not good:
                raise UserError(name, got=getattr(self, name), expected=expected, do="change it")

        for name in ("num_inference_steps", "num_images_per_prompt", "batch_size"):
            check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("guidance_scale", "token_guidance_scale"):
            check(name, math.isfinite(getattr(self, name) or 0), "a finite number, 1 for none")
        check("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more")
        check("top_k", self.top_k >= 0, "0 (all) or more")
        check("top_p", 0 < self.top_p <= 1, "a share in (0, 1]")
        check("seed", 0 <= self.seed < 2**32, "0 to 2**32 - 1")
        check("sampler", self.sampler in SAMPLERS, f"one of {', '.join(SAMPLERS)}")


def make_settings(**values: Any) -> Settings:
    """Settings of keyword arguments.

    Raises:
      UserError: an unknown one, named with the nearest, or a value of another type or out of range.
    """
    return from_dict(Settings, values)


def picture_size(config: Blip3oConfig, settings: Settings) -> tuple[int, int]:
    """Height and width of pictures in pixels.

    Raises:
      UserError: one that the autoencoder's factor does not divide.
    """
    factor = config.autoencoder.spatial_factor
    for name in ("height", "width"):
        size = getattr(settings, name)
        if size is not None and (size < factor or size % factor):
            near = max(factor, round(size / factor) * factor)
            raise UserError(name, got=size, expected=f"a multiple of {factor} pixels", do=f"try {near}")
    return settings.height or config.image_size, settings.width or config.image_size


def check_requests(
    config: Blip3oConfig, tokenizer: Tokenizer, requests: Sequence[prompts.Prompt], settings: Settings
) -> None:
    """Finds mistakes in all requests before any work is done: it needs no weights.

    Raises:
      UserError: no request, a size, a task or references that the model does not take, a prompt that is empty or too
        long.
    """
    if not requests:
        raise UserError("prompt", got="none", expected="at least one", do="give a prompt")
    picture_size(config, settings)
    for request in requests:
        if not request.text.strip() and request.task != "reconstruct" and request.target is None:
            raise UserError(
                "prompt", got="an empty one", expected="a caption or an instruction", do="say what to paint"
            )
    negative = [] if settings.negative_prompt is None else [prompts.Prompt("t2i", settings.negative_prompt)]
    for request in (*requests, *negative):
        prompts.sequences(config, tokenizer, [request])
    if settings.negative_prompt and token_scales(config, settings, requests) is not None:
        for request in requests:
            prompts.sequences(config, tokenizer, [request.saying(settings.negative_prompt)])


def token_scales(config: Blip3oConfig, settings: Settings, requests: Sequence[prompts.Prompt]) -> np.ndarray | None:
    """Guidance f32[P] of the tokens of requests, None where all are 1: as asked, or the checkpoint's own."""
    asked = settings.token_guidance_scale
    own = {"t2i": config.token_guidance_scale, "edit": config.edit_token_guidance_scale}
    scales = [own.get(request.task, 1.0) if asked is None else asked for request in requests]
    return None if all(scale == 1 for scale in scales) else np.array(scales, np.float32)
