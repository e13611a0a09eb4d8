"""Settings of generation, and the checks that need no weights."""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Annotated, Any

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.model import Guidance, Steps
from blip3o_jax.config.schema import Range, Seed, Size, convert_value, from_dict
from blip3o_jax.diffusion import samplers
from blip3o_jax.errors import UserError, require
from blip3o_jax.generate import best_of
from blip3o_jax.generate.ar import Temperature, TokenSampling, TopK, TopP
from blip3o_jax.generate.paint import Denoising, SamplerName
from blip3o_jax.generate.prompts import Prompt, Request, check_references, make_request
from blip3o_jax.generate.window import Decoding, Method, Window
from blip3o_jax.text import tasks
from blip3o_jax.text.tokenizer import Tokenizer

Images = Annotated[int, Range(1, best_of.STRIDE)]
Candidates = Annotated[int, Range(1, 1000)]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of generation, named as in diffusers and sample.py."""

    negative_prompt: str | None = None
    height: Size | None = None  # pixels; default: the model's training resolution
    width: Size | None = None
    num_inference_steps: Steps | None = None  # default: the checkpoint's
    guidance_scale: Guidance | None = None  # of denoising; 1: none; default: the checkpoint's
    token_guidance_scale: Guidance | None = None  # of the image tokens; default: the checkpoint's for the task
    num_images_per_prompt: Images = 1
    best_of: Candidates = 1  # candidates per image; the reward selects one
    reward: str | None = None  # a key of rl.rewards.REWARDS, or package.module:attribute
    seed: Seed = 0
    temperature: Temperature = TokenSampling.temperature
    top_k: TopK = TokenSampling.top_k
    top_p: TopP = TokenSampling.top_p
    batch_size: Images = 8  # images per batch
    sampler: SamplerName = Denoising.sampler
    image_ids_only: bool = TokenSampling.image_ids_only
    token_decoding: Method = Decoding.method  # affects speed only, not the tokens
    token_window: Window | None = None  # tokens per pass of parallel decoding; default: depends on the batch
    tiling: bool = False  # encode and decode large images in tiles

    def __post_init__(self):
        for name, hint in typing.get_type_hints(Settings, include_extras=True).items():
            object.__setattr__(self, name, convert_value(hint, getattr(self, name), name))

    @property
    def sampling(self) -> TokenSampling:
        """The token sampling settings."""
        return TokenSampling(self.temperature, self.top_k, self.top_p, self.image_ids_only)

    @property
    def decoding(self) -> Decoding:
        """The token decoding settings."""
        return Decoding(self.token_decoding, self.token_window)

    @property
    def denoising(self) -> Denoising:
        """The denoising settings; requires settings from `completed`."""
        return Denoising(self.num_inference_steps, self.sampler)


def make_settings(**values: Any) -> Settings:
    """Builds settings from keyword arguments.

    Raises:
      UserError: an unknown name (the nearest is suggested), or a value of the wrong type or out of range.
    """
    return from_dict(Settings, values)


def completed(config: Blip3oConfig, settings: Settings) -> Settings:
    """Fills in the checkpoint's number of steps and guidance scale where they are unset.

    Raises:
      UserError: the guidance scale differs from the one distilled into the weights.
    """
    made_for = config.dit.mean_flow
    steps, scale = config.num_inference_steps, config.guidance_scale
    if made_for is not None:
        steps, scale = made_for.max_steps, made_for.guidance_scale
    if made_for is not None and settings.guidance_scale not in (None, scale):
        expected = f"{scale:g}, which is distilled into this checkpoint"
        raise UserError("guidance_scale", got=settings.guidance_scale, expected=expected, do="leave it out")
    steps = settings.num_inference_steps or steps
    scale = scale if settings.guidance_scale is None else settings.guidance_scale
    return dataclasses.replace(settings, num_inference_steps=steps, guidance_scale=scale)


def image_size(config: Blip3oConfig, settings: Settings) -> tuple[int, int]:
    """Returns the image height and width in pixels.

    Raises:
      UserError: a size is not a multiple of the autoencoder's factor.
    """
    factor = config.autoencoder.spatial_factor
    for name in ("height", "width"):
        size = getattr(settings, name)
        if size is not None and size % factor:
            near = max(factor, round(size / factor) * factor)
            raise UserError(name, got=size, expected=f"a multiple of {factor} pixels", do=f"try {near}")
    return settings.height or config.image_size, settings.width or config.image_size


@dataclasses.dataclass(frozen=True)
class Requests:
    """Validated prompts with their settings."""

    settings: Settings
    size: tuple[int, int]  # image height and width in pixels
    prompts: tuple[Request, ...]
    negative: Request | None  # the negative prompt, if denoising is guided by one
    judge: Any = None  # rl.judge.Judge, if a reward selects among candidates


def check_requests(
    config: Blip3oConfig, tokenizer: Tokenizer, prompts: Sequence[Prompt], settings: Settings
) -> Requests:
    """Validates all prompts and settings without the weights.

    Raises:
      UserError: no prompt, or another type; a size, task or references that the model does not support; an empty or
        too long prompt; a seed out of range; a loaded reference of extreme aspect ratio; a sampler that cannot be
        imported.
    """
    known = isinstance(prompts, Sequence) and all(isinstance(prompt, Prompt) for prompt in prompts)
    require(known, "requests", repr(prompts)[:100], "a list of generate.prompts.Prompt", "make them of the texts")
    require(len(prompts) > 0, "prompt", "none", "at least one", "give a prompt")
    size, settings = image_size(config, settings), completed(config, settings)
    samplers.find(settings.sampler)
    settings.decoding.check(config.num_image_tokens)
    chosen = settings.best_of == 1 or settings.reward is not None
    require(
        chosen, "best_of", f"{settings.best_of} without a reward", "a reward that chooses", "name one: --reward NAME"
    )
    for prompt in prompts:
        convert_value(Seed | None, prompt.seed, "seed")
        check_references(config, prompt, *size)
        empty = isinstance(prompt.text, str) and not prompt.text.strip()
        if empty and tasks.find(prompt.task).needs_text and prompt.target is None:
            raise UserError(
                "prompt", got="an empty one", expected="a caption or an instruction", do="describe the image"
            )
    scales = [token_scale(config, settings.token_guidance_scale, prompt.task) for prompt in prompts]
    without = None if all(scale == 1 for scale in scales) else settings.negative_prompt or ""
    rows = [make_request(config, tokenizer, prompt, scale, without) for prompt, scale in zip(prompts, scales)]
    negative = None
    if settings.negative_prompt is not None:
        negative = make_request(config, tokenizer, Prompt("t2i", settings.negative_prompt))
    guided = settings.guidance_scale != 1 and config.dit.mean_flow is None
    return Requests(settings, size, tuple(rows), negative if guided else None)


def unsuitable(config: Blip3oConfig, checked: Requests) -> str | None:
    """Returns a warning if a setting has no effect or does not suit a distilled checkpoint, else None."""
    settings, made_for = checked.settings, config.dit.mean_flow
    unguided = checked.negative is None and all(request.unguided is None for request in checked.prompts)
    if settings.negative_prompt is not None and unguided:
        scales = "token_guidance_scale is 1" if made_for else "guidance_scale and token_guidance_scale are 1"
        return f"negative_prompt has no effect: {scales}"
    if made_for is None:
        return None
    if settings.num_inference_steps > made_for.max_steps:
        return f"this checkpoint was distilled to at most {made_for.max_steps} steps: more add time, not quality"
    if settings.sampler in samplers.SAMPLERS and settings.sampler != "euler":
        return f"this checkpoint was distilled for the sampler euler: {settings.sampler} does not benefit from it"
    return None


def token_scale(config: Blip3oConfig, asked: float | None, task: str | tasks.Task) -> float:
    """Returns the token guidance scale of a task: the one asked for, else the checkpoint's default."""
    task = tasks.find(task)
    if asked is not None:
        return asked
    if task.target_is_reference:
        return 1.0
    return config.edit_token_guidance_scale if task.has_references else config.token_guidance_scale


def guides_tokens(config: Blip3oConfig, asked: float | None, references: bool) -> bool:
    """Returns whether the tokens of any task, with references or without, are guided; arguments as in `token_scale`."""
    known = ("t2i", "edit") if references else ("t2i",)
    return any(token_scale(config, asked, task) != 1 for task in known)
