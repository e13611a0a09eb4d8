"""GenEval's rules as rewards: are the asked objects there, as many, in their colours and places.

Metadata follow GenEval's schema. Options say who looks at the pictures: `detector`, with `model` and `clip`, as for
`blip3o_jax.evals geneval`; by default the demo world's verifier, which knows nothing of photographs.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_jax.evals.detectors import Judge, open_detector
from blip3o_jax.evals.geneval import Verdict, check_metadata, judge

Metadata = Sequence[Mapping[str, Any]]


def geneval(prompts: Sequence[str], images: np.ndarray, metadata: Metadata, **options: str) -> np.ndarray:
    """The continuous reward, at most 1: exact counts, colours, positions; what was not asked for does no harm."""
    return np.array([verdict.reward for verdict in _verdicts(prompts, images, metadata, options)], np.float32)


def geneval_strict(prompts: Sequence[str], images: np.ndarray, metadata: Metadata, **options: str) -> np.ndarray:
    """1 for exactly what was asked and nothing else, 0 otherwise."""
    return np.array([verdict.strict for verdict in _verdicts(prompts, images, metadata, options)], np.float32)


def geneval_official(prompts: Sequence[str], images: np.ndarray, metadata: Metadata, **options: str) -> np.ndarray:
    """1 where the benchmark's own rule holds, 0 otherwise."""
    return np.array([verdict.correct for verdict in _verdicts(prompts, images, metadata, options)], np.float32)


def check(prompts: Sequence[str], metadata: Metadata) -> None:
    """Raises UserError for metadata that do not follow GenEval's schema."""
    for prompt, entry in zip(prompts, metadata, strict=True):
        check_metadata(entry, f"prompt {prompt!r}")


def _verdicts(prompts, images, metadata, options) -> list[Verdict]:
    check(prompts, metadata)
    looking = _detector(**options)
    found = (looking.detector(image) for image in images)
    return [judge(seen, entry, looking.thresholds) for seen, entry in zip(found, metadata, strict=True)]


@functools.lru_cache(maxsize=2)
def _detector(detector: str = "verifier", model: str | None = None, clip: str | None = None) -> Judge:
    return open_detector(detector, model, clip)
