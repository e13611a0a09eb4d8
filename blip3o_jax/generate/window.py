"""Chooses how many tokens a decoder pass decodes.

A pass over W tokens costs less than W passes and decodes the correct guesses plus one token. The best W depends on the
number of rows: once these saturate the processor, wrong guesses cost more than right ones save
(`benchmarks/decoding.py`).
"""

import dataclasses
from typing import Annotated

from blip3o_jax.config.schema import OneOf, Range
from blip3o_jax.errors import require
from blip3o_jax.nn import few_rows

Method = Annotated[str, OneOf("auto", "parallel", "sequential")]
Window = Annotated[int, Range(2, 65_536)]

CPU_WINDOWS = ((2, 8), (4, 4), (8, 3))  # (largest number of rows, window); with more rows, not every CPU gains
ACCELERATOR_TOKENS, ACCELERATOR_WINDOW = 256, 16  # most tokens of a memory-bound pass, and of one row in it


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How many image tokens a decoder pass decodes; the tokens themselves do not depend on it."""

    method: Method = "auto"
    window: Window | None = None  # tokens per row and pass; default: by the number of rows

    def check(self, num_tokens: int) -> None:
        """Raises UserError if the window contradicts the method or exceeds the `num_tokens` of an image."""
        if self.window is None:
            return
        good = self.method != "sequential"
        require(good, "token_window", f"{self.window} for sequential decoding", "parallel", "leave one of them out")
        good = self.window <= num_tokens
        require(good, "token_window", self.window, f"at most the {num_tokens} tokens of an image", "lower it")

    def size(self, rows: int, num_tokens: int, platform: str, temperature: float = 1.0) -> int:
        """Returns W; 1 decodes token by token.

        Args:
          rows: rows of a pass on one device: twice the images with guidance.
          num_tokens: tokens of an image.
          platform: platform that the decoder is compiled for.
          temperature: sampling temperature; above 1, guesses are too often wrong to pay on CPU.
        """
        if self.method == "sequential":
            return 1
        if self.window is not None:
            return self.window
        least = 2 if self.method == "parallel" else 1
        if platform == "cpu" and temperature > 1 and self.method == "auto":
            return 1
        return min(max(least, _best(rows, platform)), num_tokens)


def _best(rows: int, platform: str) -> int:
    if platform == "cpu":
        return next((window for most, window in CPU_WINDOWS if rows <= most), 1)
    if platform != "tpu" and rows <= few_rows.ROWS:  # the few-rows kernels gain more than a wider window
        return min(few_rows.ROWS // 2, few_rows.ROWS // rows)
    return min(ACCELERATOR_WINDOW, ACCELERATOR_TOKENS // rows)
