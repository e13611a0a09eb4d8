"""How many tokens a pass of the decoder decodes.

A pass over W tokens costs less than W passes, and decodes as many tokens as were guessed right, and one more. What pays
depends on the rows of a pass: once they keep the processor busy by themselves, wrong guesses cost what they save.
`benchmarks/decoding.py` measures it.
"""

import dataclasses
from typing import Annotated

from blip3o_jax.config.schema import OneOf, Range
from blip3o_jax.errors import require
from blip3o_jax.nn import few_rows

Method = Annotated[str, OneOf("auto", "parallel", "sequential")]
Window = Annotated[int, Range(2, 65_536)]

CPU_WINDOWS = ((2, 8), (4, 6), (8, 4), (16, 3))  # rows of a pass up to which a window pays, and that window
ACCELERATOR_TOKENS, ACCELERATOR_WINDOW = 256, 16  # of a pass that waits for the weights anyway, and of one row


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How image tokens are decoded; their values are the same in any way."""

    method: Method = "auto"
    window: Window | None = None  # tokens of a row in a pass; default: what suits the number of rows

    def check(self, num_tokens: int) -> None:
        """Raises UserError for a window that does not fit.

        Args:
          num_tokens: of an image.
        """
        if self.window is None:
            return
        good = self.method != "sequential"
        require(good, "token_window", f"{self.window} for sequential decoding", "parallel", "leave one of them out")
        good = self.window <= num_tokens
        require(good, "token_window", self.window, f"at most the {num_tokens} tokens of an image", "lower it")

    def size(self, rows: int, num_tokens: int, platform: str, temperature: float = 1.0) -> int:
        """W; 1 decodes one by one.

        Args:
          rows: of a pass on one device, with guidance twice the images.
          platform: that the decoder is compiled for.
          temperature: of the tokens; above 1 too few guesses are right for a CPU.
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
    if platform != "tpu" and rows <= few_rows.ROWS:  # the kernels for few rows are worth more than a wider window
        return min(few_rows.ROWS // 2, few_rows.ROWS // rows)
    return max(1, min(ACCELERATOR_WINDOW, ACCELERATOR_TOKENS // rows))
