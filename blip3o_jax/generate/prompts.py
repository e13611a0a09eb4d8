"""Prompts and reference images to the arrays that decoding starts from (host side).

P prompts, T positions (a multiple of `BUCKET`, so that few shapes are compiled), R references.
"""

import dataclasses
import textwrap
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.data import images
from blip3o_jax.errors import UserError
from blip3o_jax.text import sequence
from blip3o_jax.text.tokenizer import Tokenizer

BUCKET = 64


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One conversation to be answered with a picture."""

    task: str  # t2i | edit | reconstruct
    text: str
    references: tuple[Image.Image | str, ...] = ()  # pictures, or files that are read when their batch is made
    target: Image.Image | None = None  # its codes are given instead of being decoded
    seed: int | None = None  # of its pictures, in [0, 2**32); default: that of the settings

    def saying(self, text: str) -> "Prompt":
        """The same conversation with another text, or with none: a reconstruction is an edit with a default text."""
        return dataclasses.replace(self, text=text, task="edit" if self.task == "reconstruct" else self.task)


@dataclasses.dataclass(frozen=True)
class PromptArrays:
    """Rows of P prompts, padded on the left."""

    tokens: np.ndarray  # i32[P T]
    valid: np.ndarray  # bool[P T]
    image_slot: np.ndarray  # i32[P T]
    window_start: np.ndarray  # i32[P]
    tokenizer_pixels: np.ndarray  # f32[P 1+R S S 3], target then references; zeros where there is none
    ref_pixels: np.ndarray | None  # f32[P Y X 3], the first reference; None where no form of the model needs it
    has_ref: np.ndarray  # bool[P]
    has_image: bool  # any target or reference in tokenizer_pixels

    def first(self, count: int) -> "PromptArrays":
        """The rows of the first `count` prompts."""
        rows = {name: x[:count] for name, x in vars(self).items() if isinstance(x, np.ndarray)}
        return dataclasses.replace(self, **rows)


def loaded(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts whose references are pictures; a file that several name is read once.

    Raises:
      UserError: a file that is no picture.
    """
    paths = {source for prompt in prompts for source in prompt.references if isinstance(source, str)}
    pictures = {path: images.load_image(path) for path in paths}

    def read(references: Iterable[Image.Image | str]) -> tuple[Image.Image, ...]:
        return tuple(pictures[source] if isinstance(source, str) else source for source in references)

    return [dataclasses.replace(prompt, references=read(prompt.references)) for prompt in prompts]


def prepare(
    config: Blip3oConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    height: int,
    width: int,
    length: int | None = None,
) -> PromptArrays:
    """Tokens and pixels of prompts; `height` and `width` in pixels are those of the picture to come.

    Args:
      length: T; default: the next multiple of BUCKET that holds them all.

    Raises:
      UserError: what `sequences` raises, or a prompt longer than `length`.
    """
    rows = sequences(config, tokenizer, prompts)
    room = min(_room(config, prompt) for prompt in prompts)
    longest = max(len(row) for row in rows)
    length = length or min(-(-longest // BUCKET) * BUCKET, room)
    arrays = sequence.stack(rows, length, config.tokens.pad, side="left")
    needs_latent = config.edit.vae_condition or config.edit.vae_noise
    return PromptArrays(
        tokens=arrays["tokens"],
        valid=np.arange(length) >= length - arrays["length"][:, None],
        image_slot=arrays["image_slot"],
        window_start=arrays["window_start"],
        tokenizer_pixels=_tokenizer_pixels(prompts, config.image_tokenizer.image_size),
        ref_pixels=_first_references(prompts, height, width) if needs_latent else None,
        has_ref=np.array([bool(prompt.references) for prompt in prompts]),
        has_image=any(prompt.references or prompt.target for prompt in prompts),
    )


def sequences(config: Blip3oConfig, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[sequence.Sequence]:
    """Token rows of prompts, each of its own length.

    Raises:
      UserError: a prompt that does not fit the decoder's context, and what `sequence.build` raises.
    """
    rows = []
    for prompt in prompts:
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
        rows.append(row)
    return rows


def _room(config: Blip3oConfig, prompt: Prompt) -> int:
    """Positions for a prompt: those of the decoder less the tokens that will be decoded."""
    return config.decoder.max_length - (config.num_image_tokens if prompt.target is None else 0)


def _tokenizer_pixels(prompts: Sequence[Prompt], size: int) -> np.ndarray:
    slots = 1 + max(len(prompt.references) for prompt in prompts)
    pixels = np.zeros((len(prompts), slots, size, size, 3), np.float32)
    for row, prompt in enumerate(prompts):
        for slot, image in enumerate((prompt.target, *prompt.references)):
            if image is not None:
                pixels[row, slot] = images.tokenizer_pixels(image, size)
    return pixels


def _first_references(prompts: Sequence[Prompt], height: int, width: int) -> np.ndarray:
    blank = np.zeros((height, width, 3), np.float32)
    return np.stack([images.target_pixels(p.references[0], height, width) if p.references else blank for p in prompts])
