"""Rewards for rendered text: what the prompt has in double quotes against what is read in the picture.

Source: the reference's text reward, by edit distance, case and spaces ignored. It gives prompts without quotes 0;
here they are refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax.errors import UserError
from blip3o_jax.evals.text import ocr_reward, prompts_without_text, quoted_text, text_score
from blip3o_jax.world.reader import read_text


def text(prompts: Sequence[str], images: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """1 - distance / length in [0, 1], read by the demo world's reader of signs."""
    check(prompts, metadata)
    pairs = zip(prompts, images, strict=True)
    return np.array([ocr_reward(prompt, read_text(image)) for prompt, image in pairs], np.float32)


def text_exact(prompts: Sequence[str], images: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """1 where exactly the quoted text is read, 0 otherwise."""
    check(prompts, metadata)
    pairs = zip(prompts, images, strict=True)
    return np.array([text_score(quoted_text(prompt), read_text(image)).exact for prompt, image in pairs], np.float32)


def check(prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError for prompts without a quoted text."""
    del metadata
    bad = prompts_without_text(prompts)
    if bad:
        raise UserError(
            f"text reward: got {prompts[bad[0]]!r} ({len(bad)} of {len(prompts)} prompts) - expected a text in double "
            "quotes - quote what is to be written, or leave the prompt out"
        )
