"""Rewards for rendered text: what the prompt has in double quotes against what is read in the picture.

Source: the reference's text reward, by edit distance, case and spaces ignored. It gives prompts without quotes 0;
here they are refused. The option `reader` says what reads: the demo world's reader of signs (`world`), or an engine for
photographs (`rapidocr`, of the extra `[ocr]`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax.errors import UserError
from blip3o_jax.evals.readers import open_reader
from blip3o_jax.evals.text import ocr_reward, prompts_without_text, quoted_text, text_score


def text(
    prompts: Sequence[str], images: np.ndarray, metadata: Sequence[Mapping[str, Any]], reader: str = "world"
) -> np.ndarray:
    """1 - distance / length in [0, 1]."""
    pairs = _read(prompts, images, metadata, reader)
    return np.array([ocr_reward(prompt, seen) for prompt, seen in pairs], np.float32)


def text_exact(
    prompts: Sequence[str], images: np.ndarray, metadata: Sequence[Mapping[str, Any]], reader: str = "world"
) -> np.ndarray:
    """1 where exactly the quoted text is read, 0 otherwise."""
    pairs = _read(prompts, images, metadata, reader)
    return np.array([text_score(quoted_text(prompt), seen).exact for prompt, seen in pairs], np.float32)


def check(prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError for prompts without a quoted text."""
    del metadata
    bad = prompts_without_text(prompts)
    if bad:
        raise UserError(
            "text reward",
            got=f"{prompts[bad[0]]!r} ({len(bad)} of {len(prompts)} prompts)",
            expected="a text in double quotes",
            do="quote what is to be written, or leave the prompt out",
        )


def _read(prompts, images, metadata, reader: str) -> list[tuple[str, str]]:
    """Every prompt with what is read in its picture."""
    check(prompts, metadata)
    read = open_reader(reader)
    return [(prompt, read(image)) for prompt, image in zip(prompts, images, strict=True)]
