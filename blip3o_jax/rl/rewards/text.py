"""Rewards for rendered text: the quoted text of the prompt against the text read from the image.

Source: the reference's text reward, by edit distance, case and spaces ignored. It gives prompts without quotes 0;
here they are refused. Options: `reader` says what reads, the demo world's reader of signs (`world`) or an engine for
photographs (`rapidocr`, of the extra `[ocr]`); `rule` what counts as a quotation, see `evals.text.RULES`.
"""

from collections.abc import Sequence

import numpy as np

from blip3o_jax.config import registry
from blip3o_jax.errors import UserError
from blip3o_jax.evals.readers import check_legible, open_reader
from blip3o_jax.evals.text import RULES, normalize, ocr_reward, text_score
from blip3o_jax.types import RewardInput

Inputs = Sequence[RewardInput]


class Text:
    """1 - edit distance / length in [0, 1].

    Args:
      reader: a key of `evals.readers.READERS`, or `package.module:attribute`.
      rule: a key of `evals.text.RULES`, or `package.module:attribute`.
    """

    def __init__(self, reader: str = "world", rule: str = "quotation"):
        self._quoted = registry.resolve(RULES, rule, "rule of quotations")
        self._name, self._rule, self._read = reader, rule, open_reader(reader)

    def check(self, inputs: Inputs) -> None:
        """Raises UserError for prompts without a quoted text, or with one that the reader cannot read."""
        texts = [self._quoted(one.prompt) for one in inputs]
        bad = [one.prompt for one, text in zip(inputs, texts, strict=True) if not normalize(text)]
        if bad:
            raise UserError(
                "text reward",
                got=f"{bad[0]!r} ({len(bad)} of {len(inputs)} prompts)",
                expected="a text in double quotes",
                do="quote what is to be written, or leave the prompt out",
            )
        check_legible(texts, self._read, self._name)

    def __call__(self, inputs: Inputs) -> np.ndarray:
        return np.array([ocr_reward(one.prompt, self._read(one.image), self._rule) for one in inputs], np.float32)


class TextExact(Text):
    """1 where exactly the quoted text is read, 0 otherwise."""

    def __call__(self, inputs: Inputs) -> np.ndarray:
        pairs = ((self._quoted(one.prompt), self._read(one.image)) for one in inputs)
        return np.array([text_score(*pair).exact for pair in pairs], np.float32)
