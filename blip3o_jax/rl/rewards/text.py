"""Rewards for rendered text: the quoted text of the prompt compared with the text read from the image.

Source: the text reward of the reference, by edit distance without case and spaces.
Differs from the reference: prompts without quoted text are refused instead of scored 0.
"""

from collections.abc import Sequence

import numpy as np

from blip3o_jax.config import registry
from blip3o_jax.errors import require
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
        """Raises UserError for prompts without quoted text, or with a text that the reader cannot read."""
        texts = [self._quoted(one.prompt) for one in inputs]
        bad = [one.prompt for one, text in zip(inputs, texts, strict=True) if not normalize(text)]
        got = f"{bad[0]!r} ({len(bad)} of {len(inputs)} prompts)" if bad else None
        require(not bad, "text reward", got, "a text in double quotes", "quote the text, or leave the prompt out")
        check_legible(texts, self._read, self._name)

    def __call__(self, inputs: Inputs) -> np.ndarray:
        return np.array([ocr_reward(one.prompt, self._read(one.image), self._rule) for one in inputs], np.float32)


class TextExact(Text):
    """1 if the text read is exactly the quoted text, else 0."""

    def __call__(self, inputs: Inputs) -> np.ndarray:
        pairs = ((self._quoted(one.prompt), self._read(one.image)) for one in inputs)
        return np.array([text_score(*pair).exact for pair in pairs], np.float32)
