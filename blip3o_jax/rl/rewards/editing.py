"""Rewards for edits of the demo world: is the instruction carried out, and is everything else as it was.

Metadata name the edit, `{"edit": {"index", "seed", "kinds", "split"}}`, as the world's data source gives them.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from blip3o_jax.errors import UserError
from blip3o_jax.evals.editing import EditScore, score_edit
from blip3o_jax.evals.text import text_score
from blip3o_jax.world import edits
from blip3o_jax.world.edits import TOLERANCE, Edit
from blip3o_jax.world.reader import read_text
from blip3o_jax.world.render import SMALLEST
from blip3o_jax.world.scenes import UNITS
from blip3o_jax.world.verifier import THRESHOLD, detect

PSNR_RANGE = (10.0, 30.0)  # dB of the untouched region that count as nothing kept and as all kept


def edit(prompts: Sequence[str], images: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """In [0, 1]: whether the instruction is fulfilled, times how much of the untouched region is kept."""
    scores = _scores(prompts, images, metadata)
    return np.array([score.fulfilled * kept(score) for score in scores], np.float32)


def edit_graded(prompts: Sequence[str], images: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """In [0, 1]: how nearly the picture shows the scene after the edit, times how much is kept."""
    scores = _scores(prompts, images, metadata)
    rows = zip(images, metadata, scores, strict=True)
    return np.array([likeness(find(entry), image) * kept(score) for image, entry, score in rows], np.float32)


def edit_kept(prompts: Sequence[str], images: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """In [0, 1]: how much of the untouched region is kept, whether or not the instruction is fulfilled."""
    return np.array([kept(score) for score in _scores(prompts, images, metadata)], np.float32)


def edit_psnr(prompts: Sequence[str], images: np.ndarray, metadata: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Peak signal-to-noise ratio of the untouched region in dB; 0 where there is none."""
    return np.nan_to_num(np.array([score.psnr for score in _scores(prompts, images, metadata)], np.float32))


def check(prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError for metadata that name no edit of the world."""
    for prompt, entry in zip(prompts, metadata, strict=True):
        known = entry.get("edit")
        if not isinstance(known, Mapping) or not {"index", "seed", "kinds", "split"} <= known.keys():
            raise UserError(
                "edit reward",
                got=f"metadata {dict(entry)} of {prompt!r}",
                expected="an edit of the demo world",
                do="use the world's edits as prompts",
            )


def find(metadata: Mapping[str, Any]) -> Edit:
    """The edit that metadata name."""
    return _edit(json.dumps(metadata["edit"]))


def kept(score: EditScore) -> float:
    """Share in [0, 1] of the untouched region that is kept, linear in dB over PSNR_RANGE; 1 where there is none."""
    low, high = PSNR_RANGE
    return 1.0 if np.isnan(score.psnr) else float(np.clip((score.psnr - low) / (high - low), 0, 1))


def likeness(wanted: Edit, image: np.ndarray) -> float:
    """How nearly a picture shows the scene after an edit, in [0, 1], 1 where the edit is fulfilled.

    Objects: found ones with shape, colour and place right count 1, with shape or colour wrong a half, over the larger
    of the numbers found and expected. Signs: similarity of the letters.
    """
    if wanted.target.sign is not None:
        return text_score(wanted.target.sign.text, read_text(image)).similarity
    if edits.fulfilled(wanted, image):
        return 1.0
    found, scale = [item for item in detect(image) if item.score >= THRESHOLD], min(image.shape[:2]) / UNITS
    expected, total = len(wanted.target.objects), 0.0
    count = max(expected, len(found), 1)
    for number, item in enumerate(wanted.target.objects):

        def agreement(seen, item=item, number=number):
            near = max(abs(item.x - seen.center[0] / scale), abs(item.y - seen.center[1] / scale)) <= TOLERANCE
            same = (seen.label == item.shape) + (seen.color == item.color)
            return same / 2 * (near or number == wanted.free)

        best = max(found, key=agreement, default=None)
        if best is not None and agreement(best):
            total += agreement(best)
            found.remove(best)
    return min(total / count, 0.9)


def _scores(prompts, images, metadata) -> list[EditScore]:
    del prompts
    return [score_edit(find(entry), _enlarged(image)) for image, entry in zip(images, metadata, strict=True)]


def _enlarged(image: np.ndarray) -> np.ndarray:
    """A picture too small to show shapes at the world's own size."""
    if min(image.shape[:2]) >= SMALLEST:
        return image
    return np.asarray(Image.fromarray(image).resize((UNITS, UNITS), Image.Resampling.BILINEAR))


@functools.lru_cache(maxsize=4096)
def _edit(entry: str) -> Edit:
    known = json.loads(entry)
    return edits.sample(known["index"], known["seed"], known["kinds"], known["split"])
