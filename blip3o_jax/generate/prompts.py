"""Prompts and reference images to the arrays that decoding starts from (host side).

P prompts, T positions (a multiple of `BUCKET`, so that few shapes are compiled), R references, N image tokens.
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
from blip3o_jax.errors import UserError
from blip3o_jax.generate.references import image_of
from blip3o_jax.text import sequence, tasks
from blip3o_jax.text.tokenizer import Tokenizer
from blip3o_jax.types import RewardInput

BUCKET = 64


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One conversation to be answered with an image."""

    task: str | tasks.Task  # t2i | edit | reconstruct | package.module:attribute
    text: str
    references: tuple[Any, ...] = ()  # images as `references.image_of` takes them; files are read with their batch
    target: Image.Image | None = None  # its codes are given instead of being decoded
    seed: int | None = None  # of its images, in [0, 2**32); default: that of the settings
    first: int = 0  # number of its first image: those of one seed are numbered from 0
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)  # what a reward may look at

    def saying(self, text: str) -> "Prompt":
        """The same conversation with another text, or with none, which the task's default does not replace."""
        return dataclasses.replace(self, text=text, task=dataclasses.replace(tasks.find(self.task), default_text=""))

    def judged(self, image: np.ndarray | None = None, seed: int | None = None) -> RewardInput:
        """What a reward sees of an image; without one, of the prompt alone. References must have been read."""
        references = tuple(np.asarray(reference) for reference in self.references)
        return RewardInput(self.text, image, references, self.metadata, self.task, seed)


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt that was checked, with its row of tokens."""

    prompt: Prompt
    row: sequence.Sequence
    unguided: sequence.Sequence | None = None  # the same conversation without its text, where tokens are guided
    token_guidance_scale: float = 1.0


class Reference(NamedTuple):
    """Latents of first references."""

    latent: jax.Array  # f32[P y x C], scaled
    present: jax.Array  # bool[P], prompts that have one


@flax.struct.dataclass
class PromptRows:
    """Prompts on the devices, padded on the left and ending in the scale token unless a target follows.

    Where tokens are guided, the text has 2P rows: the second half are the same prompts without their text, which share
    the images of the first.
    """

    tokens: jax.Array  # i32[P T] or [2P T], positions of an image hold the pad id
    valid: jax.Array  # bool, likewise, False for padding
    image_slot: jax.Array  # i32, likewise, as in types.Batch
    codes: jax.Array  # i32[P 1+R N], of the target (zeros where it is to come) and the references
    features: jax.Array | None = None  # f32[P R N F], of the references, where the model takes them
    reference: Reference | None = None  # where the model takes latents
    token_guidance_scale: jax.Array | None = None  # f32[P], where tokens are guided


@dataclasses.dataclass(frozen=True)
class PromptArrays:
    """Rows of P prompts, padded on the left; with guidance 2P rows of text, see `PromptRows`."""

    tokens: np.ndarray  # i32[P T]
    valid: np.ndarray  # bool[P T]
    image_slot: np.ndarray  # i32[P T]
    window_start: np.ndarray  # i32[P]
    tokenizer_pixels: np.ndarray  # f32[P 1+R S S 3], target then references; zeros where there is none
    ref_pixels: np.ndarray | None  # f32[P Y X 3], the first reference; None where no form of the model needs it
    has_ref: np.ndarray  # bool[P]
    has_image: bool  # whether tokenizer_pixels may hold any target or reference
    token_guidance_scale: np.ndarray | None  # f32[P]; None: not guided


def make_request(
    config: Blip3oConfig, tokenizer: Tokenizer, prompt: Prompt, scale: float = 1.0, without: str | None = None
) -> Request:
    """Builds the row of a prompt.

    Args:
      scale: guidance of its image tokens.
      without: text of the conversation that tokens are guided away from; None: there is none.

    Raises:
      UserError: a prompt that does not fit the decoder's context, and what `sequence.build` raises.
    """
    row = _row(config, tokenizer, prompt)
    unguided = None if without is None else _row(config, tokenizer, prompt.saying(without))
    return Request(prompt, row, unguided, scale)


def loaded(requests: Sequence[Request]) -> list[Request]:
    """Requests whose references are read; a file that several name is read once.

    Raises:
      UserError: a reference that is no image.
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
    """Tokens and pixels of requests; `height` and `width` in pixels are those of the image to come.

    Args:
      length: T; default: the next multiple of BUCKET that holds them all.
      max_references: R; default: the most that a prompt has.
      guided: with the rows without text; default: where the tokens of a request are guided.

    Raises:
      UserError: a prompt longer than `length`.
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
    needs_latent = config.edit.vae_condition or config.edit.vae_noise
    return PromptArrays(
        tokens=arrays["tokens"],
        valid=np.arange(length) >= length - arrays["length"][:, None],
        image_slot=arrays["image_slot"],
        window_start=arrays["window_start"],
        tokenizer_pixels=_tokenizer_pixels(prompts, config.image_tokenizer.image_size, max_references),
        ref_pixels=_first_references(prompts, height, width) if needs_latent else None,
        has_ref=np.array([bool(prompt.references) for prompt in prompts]),
        has_image=max_references > 0 or any(prompt.target for prompt in prompts),
        token_guidance_scale=scales if guided else None,
    )


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
    """Positions for a prompt: those of the decoder less the tokens that will be decoded."""
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
