"""What both sides are given: a checkpoint with random weights, a prompt, a reference picture, noise.

T prompt positions, M states of the image span, D decoder width, S side of the tokenizer's picture, y x latent cells.
"""

import dataclasses
import functools
import pathlib

import numpy as np

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.presets import preset
from blip3o_jax.text import sequence
from blip3o_jax.text.tokenizer import Tokenizer

PROMPT = "a red cube on a wooden table"
GUIDANCE_SCALE = 2.0
TOP_K, TOP_P = 1200, 0.95


@dataclasses.dataclass(frozen=True)
class Workload:
    """A picture's worth of work.

    Attributes:
      checkpoint: directory in the released layout.
      geometry: name of the preset it was made from.
      dtype: float32 | bfloat16.
      tokens: how many the row `decode` decodes.
      steps: how many denoising steps the row `DiT` takes.
      picture_steps: how many the whole picture takes.
    """

    checkpoint: pathlib.Path
    geometry: str
    dtype: str
    tokens: int
    steps: int
    picture_steps: int

    @property
    def config(self) -> Blip3oConfig:
        return preset(self.geometry)

    @functools.cached_property
    def inputs(self) -> "Inputs":
        """The arrays, the same whenever they are asked for."""
        config, random = self.config, np.random.default_rng(0)
        side, latent = config.image_tokenizer.image_size, config.latent_size
        cells = (1, latent, latent, config.autoencoder.latent_channels)
        codes = random.integers(0, config.tokens.num_image_tokens, (1, 2, config.num_image_tokens), np.int32)
        return Inputs(
            self._prompt("t2i", 0),
            self._prompt("edit", 1),
            codes,
            random.standard_normal((1, 1 + config.num_image_tokens, config.decoder.width), np.float32),
            random.standard_normal(cells, np.float32),
            random.uniform(-1, 1, (1, side, side, 3)).astype(np.float32),
            random.uniform(-1, 1, (1, config.image_size, config.image_size, 3)).astype(np.float32),
        )

    def _prompt(self, task: str, references: int) -> sequence.Sequence:
        tokenizer = Tokenizer.from_directory(self.checkpoint)
        ids, count = self.config.tokens, self.config.num_image_tokens
        return sequence.build(task, PROMPT, tokenizer, ids, count, num_refs=references, open_ended=True)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Arrays of a batch of one."""

    prompt: sequence.Sequence
    edit_prompt: sequence.Sequence  # with one reference
    codes: np.ndarray  # i32[1 2 N], the reference's are [:, 1]
    states: np.ndarray  # f32[1 M D]
    noise: np.ndarray  # f32[1 y x C]
    tokenizer_pixels: np.ndarray  # f32[1 S S 3]
    pixels: np.ndarray  # f32[1 Y X 3]
