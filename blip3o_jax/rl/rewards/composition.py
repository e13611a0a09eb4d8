"""GenEval's rules as rewards: are the asked objects there, as many, in their colours and places.

Pictures are looked at by the demo world's verifier; metadata follow GenEval's schema.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax.evals.geneval import VERIFIER_THRESHOLDS, Verdict, check_metadata, judge
from blip3o_jax.world.verifier import detect


def geneval(prompts: Sequence[str], images: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The continuous reward, at most 1: exact counts, colours, positions; what was not asked for does no harm."""
    return np.array([verdict.reward for verdict in _verdicts(prompts, images, metadata)], np.float32)


def geneval_strict(prompts: Sequence[str], images: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """1 for exactly what was asked and nothing else, 0 otherwise."""
    return np.array([verdict.strict for verdict in _verdicts(prompts, images, metadata)], np.float32)


def geneval_official(prompts: Sequence[str], images: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """1 where the benchmark's own rule holds, 0 otherwise."""
    return np.array([verdict.correct for verdict in _verdicts(prompts, images, metadata)], np.float32)


def check(prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError for metadata that do not follow GenEval's schema."""
    for prompt, entry in zip(prompts, metadata, strict=True):
        check_metadata(entry, f"prompt {prompt!r}")


def _verdicts(prompts, images, metadata) -> list[Verdict]:
    del prompts
    return [judge(detect(image), entry, VERIFIER_THRESHOLDS) for image, entry in zip(images, metadata, strict=True)]
