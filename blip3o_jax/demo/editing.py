"""Scores of images against edits of the demo world: whether the instruction is carried out, and what stays unchanged.

A requested object is excluded from the untouched region wherever it appears.
"""

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from blip3o_jax.demo.world import edits
from blip3o_jax.demo.world.edits import TOLERANCE, Edit, asked_for, fulfilled
from blip3o_jax.demo.world.reader import read_text
from blip3o_jax.demo.world.render import SMALLEST, render
from blip3o_jax.demo.world.scenes import UNITS
from blip3o_jax.demo.world.verifier import THRESHOLD, detect, distance
from blip3o_jax.evals.editing import MARGIN, EditScore, region_psnr, region_ssim, untouched
from blip3o_jax.evals.text import text_score


def score_edit(edit: Edit, image: np.ndarray) -> EditScore:
    """Scores an image uint8[S S 3] of a model against an edit."""
    source, target = render(edit.source, len(image)), render(edit.target, len(image))
    region, found = untouched(source, target), detect(image)
    for seen in asked_for(edit, image, found):
        left, top, right, bottom = (int(edge) for edge in seen.box)
        region[max(top - MARGIN, 0) : bottom + MARGIN + 1, max(left - MARGIN, 0) : right + MARGIN + 1] = False
    done = fulfilled(edit, image, found)
    return EditScore(edit.kind, done, region_psnr(image, source, region), region_ssim(image, source, region))


def score_named(origin: Mapping[str, Any], image: np.ndarray) -> EditScore:
    """Scores an image uint8[Y X 3] of any size against the edit with a given origin, see `find`."""
    return score_edit(find(origin), enlarged(image))


def find(origin: Mapping[str, Any]) -> Edit:
    """Returns the edit with a given origin: arguments of `edits.sample`, as in the metadata of the data source."""
    return _edit(json.dumps(dict(origin)))


@functools.lru_cache(maxsize=4096)
def _edit(origin: str) -> Edit:
    known = json.loads(origin)
    return edits.sample(known["index"], known["seed"], known["kinds"], known["split"])


def enlarged(image: np.ndarray) -> np.ndarray:
    """Enlarges an image uint8[Y X 3] that is too small to show shapes."""
    if min(image.shape[:2]) >= SMALLEST:
        return image
    return np.asarray(Image.fromarray(image).resize((UNITS, UNITS), Image.Resampling.BILINEAR))


def likeness(wanted: Edit, image: np.ndarray) -> float:
    """Returns the similarity in [0, 1] of an image uint8[Y X 3] to the scene after an edit; 1 if the edit is fulfilled.

    For objects: the number of detections in the right place, where one with a wrong shape or colour counts 0.5, over
    the larger of the numbers of detected and expected objects. For signs: the similarity of the texts.
    """
    if wanted.target.sign is not None:
        return text_score(wanted.target.sign.text, read_text(image)).similarity
    found = detect(image)
    if edits.fulfilled(wanted, image, found):
        return 1.0
    left, scale, total = [seen for seen in found if seen.score >= THRESHOLD], min(image.shape[:2]) / UNITS, 0.0
    count = max(len(wanted.target.objects), len(left), 1)
    for number, item in enumerate(wanted.target.objects):
        placed = [seen for seen in left if number == wanted.free or distance(item, seen, scale) <= TOLERANCE]
        agreement = [((seen.label == item.shape) + (seen.color == item.color)) / 2 for seen in placed]
        if max(agreement, default=0):
            total += max(agreement)
            left.remove(placed[agreement.index(max(agreement))])
    return min(total / count, 0.9)
