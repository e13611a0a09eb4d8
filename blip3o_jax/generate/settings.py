"""How images are made: the settings of a run, and the checks that need no weights."""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Annotated, Any

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.model import Guidance
from blip3o_jax.config.schema import Range, Seed, Size, convert_value, from_dict
from blip3o_jax.diffusion import samplers
from blip3o_jax.errors import UserError, require
from blip3o_jax.generate import best_of
from blip3o_jax.generate.ar import Temperature, TokenSampling, TopK, TopP
from blip3o_jax.generate.paint import Denoising, SamplerName, Steps
from blip3o_jax.generate.prompts import Prompt, Request, make_request
from blip3o_jax.generate.window import Decoding, Method, Window
from blip3o_jax.text import tasks
from blip3o_jax.text.tokenizer import Tokenizer

Images = Annotated[int, Range(1, best_of.STRIDE)]
Candidates = Annotated[int, Range(1, 1000)]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How images are made; the names are those of diffusers' pipelines and of sample.py."""

    negative_prompt: str | None = None
    height: Size | None = None  # pixels; default: the size the model was trained on
    width: Size | None = None
    num_inference_steps: Steps | None = None  # default: those a checkpoint was distilled to, else 30
    guidance_scale: Guidance | None = None  # of the diffusion half; 1: none; default: what was distilled, else 2
    token_guidance_scale: Guidance | None = None  # of the image tokens; default: the checkpoint's for the task
    num_images_per_prompt: Images = 1
    best_of: Candidates = 1  # candidates of each image, of which the reward chooses
    reward: str | None = None  # a key of rl.rewards.REWARDS, or package.module:attribute
    seed: Seed = 0
    temperature: Temperature = 1.0
    top_k: TopK = 1200
    top_p: TopP = 0.95
    batch_size: Images = 8  # images at a time
    sampler: SamplerName = "euler"
    image_ids_only: bool = True
    token_decoding: Method = "auto"  # the same tokens at another speed
    token_window: Window | None = None  # tokens in a pass of parallel decoding; default: by the batch
    tiling: bool = False  # encode and decode large images in tiles

    def __post_init__(self):
        for name, hint in typing.get_type_hints(Settings, include_extras=True).items():
            object.__setattr__(self, name, convert_value(hint, getattr(self, name), name))

    @property
    def sampling(self) -> TokenSampling:
        """How tokens are drawn."""
        return TokenSampling(self.temperature, self.top_k, self.top_p, self.image_ids_only)

    @property
    def decoding(self) -> Decoding:
        """How many tokens are decoded at a time."""
        return Decoding(self.token_decoding, self.token_window)

    @property
    def denoising(self) -> Denoising:
        """How latents are denoised, of settings that `completed` has filled in."""
        return Denoising(self.num_inference_steps, self.sampler)


def make_settings(**values: Any) -> Settings:
    """Settings of keyword arguments.

    Raises:
      UserError: an unknown one, named with the nearest, or a value of another type or out of range.
    """
    return from_dict(Settings, values)


def completed(config: Blip3oConfig, settings: Settings) -> Settings:
    """The settings with the checkpoint's own number of steps and guidance where they are left open.

    Raises:
      UserError: another guidance than the one that was distilled into the weights.
    """
    made_for = config.dit.mean_flow
    steps, scale = (30, 2.0) if made_for is None else (made_for.max_steps, made_for.guidance_scale)
    if made_for is not None and settings.guidance_scale not in (None, scale):
        expected = f"{scale:g}, which is distilled into this checkpoint"
        raise UserError("guidance_scale", got=settings.guidance_scale, expected=expected, do="leave it out")
    steps = settings.num_inference_steps or steps
    scale = scale if settings.guidance_scale is None else settings.guidance_scale
    return dataclasses.replace(settings, num_inference_steps=steps, guidance_scale=scale)


def unsuitable(config: Blip3oConfig, settings: Settings) -> str | None:
    """What a distilled checkpoint was not made for among settings that `completed` has filled in, in a line."""
    made_for = config.dit.mean_flow
    if made_for is None:
        return None
    if settings.num_inference_steps > made_for.max_steps:
        return f"this checkpoint was distilled to at most {made_for.max_steps} steps: more take longer, for nothing"
    if settings.sampler in samplers.SAMPLERS and settings.sampler != "euler":
        return f"this checkpoint was distilled for the sampler euler: {settings.sampler} makes no use of it"
    return None


def image_size(config: Blip3oConfig, settings: Settings) -> tuple[int, int]:
    """Height and width of images in pixels.

    Raises:
      UserError: one that the autoencoder's factor does not divide.
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
    """Prompts that were checked, and the settings that they were checked with."""

    settings: Settings
    size: tuple[int, int]  # height and width of the images in pixels
    prompts: tuple[Request, ...]
    negative: Request | None  # of the negative prompt's own tokens, where the diffusion half is guided away from it
    judge: Any = None  # of candidates, where a reward chooses among them


def check_requests(
    config: Blip3oConfig, tokenizer: Tokenizer, prompts: Sequence[Prompt], settings: Settings
) -> Requests:
    """Finds mistakes in all prompts before any work is done: it needs no weights.

    Raises:
      UserError: no prompt, a size, a task or references that the model does not take, a prompt that is empty or too
        long, a seed out of range, a sampler that
        cannot be imported.
    """
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
        empty = isinstance(prompt.text, str) and not prompt.text.strip()
        if empty and tasks.find(prompt.task).needs_text and prompt.target is None:
            raise UserError(
                "prompt", got="an empty one", expected="a caption or an instruction", do="say what to paint"
            )
    scales = [token_scale(config, settings.token_guidance_scale, prompt.task) for prompt in prompts]
    without = None if all(scale == 1 for scale in scales) else settings.negative_prompt or ""
    rows = [make_request(config, tokenizer, prompt, scale, without) for prompt, scale in zip(prompts, scales)]
    negative = None
    if settings.negative_prompt is not None:
        negative = make_request(config, tokenizer, Prompt("t2i", settings.negative_prompt))
    guided = settings.guidance_scale != 1 and config.dit.mean_flow is None
    return Requests(settings, size, tuple(rows), negative if guided else None)


def token_scale(config: Blip3oConfig, asked: float | None, task: str | tasks.Task) -> float:
    """Returns the guidance scale of the tokens of a task: as asked, or the checkpoint's own."""
    task = tasks.find(task)
    if asked is not None:
        return asked
    if task.target_is_reference:
        return 1.0
    return config.edit_token_guidance_scale if task.has_references else config.token_guidance_scale
