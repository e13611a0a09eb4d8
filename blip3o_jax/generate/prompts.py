"""Converts prompts and reference images to the host arrays that decoding starts from.

P prompts, T positions (a multiple of `BUCKET`, to limit the number of compiled shapes), R references, N image tokens.
"""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np
from PIL import Image

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.data import images
from blip3o_jax.errors import UserError, require, type_of
from blip3o_jax.generate.references import image_of
from blip3o_jax.text import sequence, tasks
from blip3o_jax.text.tokenizer import Tokenizer
from blip3o_jax.types import RewardInput

BUCKET = 64


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A task, a text and its images; raises UserError for references that are not a tuple or list."""

    task: str | tasks.Task  # t2i | edit | reconstruct | package.module:attribute
    text: str
    references: tuple[Any, ...] = ()  # images as `references.image_of` accepts; files are read with their batch
    target: Image.Image | None = None  # use this image's codes instead of decoding new ones
    seed: int | None = None  # in [0, 2**32); default: the seed of the settings
    first: int = 0  # sample number of the first image; numbers start at 0 for each seed
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)  # passed to rewards

    def __post_init__(self):
        several = isinstance(self.references, (tuple, list))
        require(several, "references", type_of(self.references), "a tuple of images", "write (image,)")

    def saying(self, text: str) -> "Prompt":
        """Returns the prompt with another text; an empty one is not replaced by the task's default."""
        return dataclasses.replace(self, text=text, task=dataclasses.replace(tasks.find(self.task), default_text=""))

    def judged(self, image: np.ndarray | None = None, seed: int | None = None) -> RewardInput:
        """Returns the reward's input for an image, or for the prompt alone. References must have been loaded."""
        references = tuple(np.asarray(reference) for reference in self.references)
        return RewardInput(self.text, image, references, self.metadata, self.task, seed)


@dataclasses.dataclass(frozen=True)
class Request:
    """A validated prompt with its token row."""

    prompt: Prompt
    row: sequence.Sequence
    unguided: sequence.Sequence | None = None  # the row without its text, for token guidance
    token_guidance_scale: float = 1.0


class Reference(NamedTuple):
    """Latents of the first reference of every prompt."""

    latent: jax.Array  # f32[P y x C], scaled
    present: jax.Array  # bool[P], False for prompts without a reference


@flax.struct.dataclass
class PromptRows:
    """Prompts on the devices, left-padded, ending in the scale token unless a target follows.

    With token guidance the text arrays have 2P rows: the second half holds the same prompts without their text and
    shares the images of the first half.
    """

    tokens: jax.Array  # i32[P T] or [2P T]; image positions hold the pad id
    valid: jax.Array  # bool, same shape; False for padding
    image_slot: jax.Array  # i32, same shape, as in types.Batch
    codes: jax.Array  # i32[P 1+R N] of the target (zeros if it is to be decoded) and the references
    features: jax.Array | None = None  # f32[P R N F] of the references, if the model uses them
    reference: Reference | None = None  # if the model uses reference latents
    token_guidance_scale: jax.Array | None = None  # f32[P]; None: no token guidance


@dataclasses.dataclass(frozen=True)
class PromptArrays:
    """Host arrays of P prompts, left-padded; with guidance 2P rows of text, see `PromptRows`."""

    tokens: np.ndarray  # i32[P T]
    valid: np.ndarray  # bool[P T]
    image_slot: np.ndarray  # i32[P T]
    window_start: np.ndarray  # i32[P]
    tokenizer_pixels: np.ndarray  # f32[P 1+R S S 3], target then references; zeros if absent
    ref_pixels: np.ndarray | None  # f32[P Y X 3], the first reference; None if the model does not use latents
    has_ref: np.ndarray  # bool[P]
    has_image: bool  # whether tokenizer_pixels may hold a target or reference
    token_guidance_scale: np.ndarray | None  # f32[P]; None: no token guidance


def make_request(
    config: Blip3oConfig, tokenizer: Tokenizer, prompt: Prompt, scale: float = 1.0, without: str | None = None
) -> Request:
    """Builds the token row of a prompt.

    Args:
      config: the model.
      tokenizer: its text tokenizer.
      prompt: the prompt.
      scale: guidance scale of its image tokens.
      without: text of the unconditional row for token guidance; None builds no such row.

    Raises:
      UserError: the prompt exceeds the decoder's context, or `sequence.build` refuses it.
    """
    row = _row(config, tokenizer, prompt)
    unguided = None if without is None else _row(config, tokenizer, prompt.saying(without))
    return Request(prompt, row, unguided, scale)


def check_references(config: Blip3oConfig, prompt: Prompt, height: int, width: int) -> None:
    """Raises UserError if the first reference is loaded, and `prepare` could not crop it to the size of the image."""
    first = prompt.references[0] if prompt.references and _uses_latents(config) else None
    if isinstance(first, Image.Image):
        images.check_aspect(first, height, width)


def loaded(requests: Sequence[Request]) -> list[Request]:
    """Loads the references of requests; a file used several times is read once.

    Raises:
      UserError: a reference is not an image.
    """
    read: dict[Any, Image.Image] = {}

    def image(source: Any) -> Image.Image:
        key = source if isinstance(source, str) else id(source)
        if key not in read:
            read[key] = image_of(source)
        return read[key]

    prompts = [
        dataclasses.replace(request.prompt, references=tuple(map(image, request.prompt.references)))
        for request in requests
    ]
    return [dataclasses.replace(request, prompt=prompt) for request, prompt in zip(requests, prompts)]


def prepare(
    config: Blip3oConfig,
    requests: Sequence[Request],
    height: int,
    width: int,
    length: int | None = None,
    max_references: int | None = None,
    guided: bool | None = None,
) -> PromptArrays:
    """Builds the arrays of a batch of requests.

    Args:
      config: the model.
      requests: P requests, with their references loaded.
      height, width: size of the generated images in pixels.
      length: T; default: the smallest multiple of BUCKET that holds every prompt.
      max_references: R; default: the largest number of references of a prompt.
      guided: add the unconditional rows; default: if a request has token guidance.

    Raises:
      UserError: a prompt is longer than `length`.
    """
    scales = np.array([request.token_guidance_scale for request in requests], np.float32)
    guided = bool((scales != 1).any()) if guided is None else guided
    rows = [request.row for request in requests] + [request.unguided for request in requests if guided]
    prompts = [request.prompt for request in requests]
    room = min(_room(config, prompt) for prompt in prompts)
    length = length or min(-(-max(map(len, rows)) // BUCKET) * BUCKET, room)
    arrays = sequence.stack(rows, length, config.tokens.pad, side="left")
    if max_references is None:
        max_references = max(len(prompt.references) for prompt in prompts)
    return PromptArrays(
        tokens=arrays["tokens"],
        valid=np.arange(length) >= length - arrays["length"][:, None],
        image_slot=arrays["image_slot"],
        window_start=arrays["window_start"],
        tokenizer_pixels=_tokenizer_pixels(prompts, config.image_tokenizer.image_size, max_references),
        ref_pixels=_first_references(prompts, height, width) if _uses_latents(config) else None,
        has_ref=np.array([bool(prompt.references) for prompt in prompts]),
        has_image=max_references > 0 or any(prompt.target for prompt in prompts),
        token_guidance_scale=scales if guided else None,
    )


def _uses_latents(config: Blip3oConfig) -> bool:
    return config.edit.vae_condition or config.edit.vae_noise


def _row(config: Blip3oConfig, tokenizer: Tokenizer, prompt: Prompt) -> sequence.Sequence:
    row = sequence.build(
        prompt.task,
        prompt.text,
        tokenizer,
        config.tokens,
        config.num_image_tokens,
        num_refs=len(prompt.references),
        pool_scale=config.pool_scale,
        open_ended=prompt.target is None,
    )
    room = _room(config, prompt)
    if len(row) > room:
        references = f" and {len(prompt.references)} references" if prompt.references else ""
        raise UserError(
            "prompt",
            got=f"{len(row)} tokens from {textwrap.shorten(prompt.text, 40)!r}{references}",
            expected=f"at most {room} of the decoder's {config.decoder.max_length} positions",
            do="shorten the text" + " or give fewer references" * bool(references),
        )
    return row


def _room(config: Blip3oConfig, prompt: Prompt) -> int:
    """Returns the positions available to a prompt: the decoder's context minus the tokens to decode."""
    return config.decoder.max_length - (config.num_image_tokens if prompt.target is None else 0)


def _tokenizer_pixels(prompts: Sequence[Prompt], size: int, max_references: int) -> np.ndarray:
    pixels = np.zeros((len(prompts), 1 + max_references, size, size, 3), np.float32)
    for row, prompt in enumerate(prompts):
        for slot, image in enumerate((prompt.target, *prompt.references)):
            if image is not None:
                pixels[row, slot] = images.tokenizer_pixels(image, size)
    return pixels


def _first_references(prompts: Sequence[Prompt], height: int, width: int) -> np.ndarray:
    pixels = np.zeros((len(prompts), height, width, 3), np.float32)
    for row, prompt in enumerate(prompts):
        if prompt.references:
            pixels[row] = images.target_pixels(prompt.references[0], height, width)
    return pixels
