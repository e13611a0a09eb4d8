"""The best of several candidates of an image: the less promising half is dropped after a look at a cheap rendering.

P prompts, B rows: the N candidates of every image of a prompt, next to each other; b rows that are left.

Source: GridAR (arXiv 2511.21185), which judges partial images while their tokens are decoded.
Differs from it:
1. The look comes when all tokens are there: rewards of images painted under fewer say little of the whole one.
2. Dropped candidates are not replaced: each is the image that its random numbers give by themselves.
`benchmarks/best_of.py` measures both the look and what follows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from blip3o_jax.data import images
from blip3o_jax.generate import paint
from blip3o_jax.generate.engine import Engine
from blip3o_jax.generate.prompts import Reference
from blip3o_jax.sharding import constrain, fetch

STEPS = 4  # of the rendering that is looked at
PAYS = 3 * STEPS  # steps of the final image from which on a look costs less than it saves
STRIDE = 100_000  # candidate c of image i has the random numbers of image i + c * STRIDE

Judge = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(images uint8[b Y X 3], their rows i32[b] of the B) -> f32[b], what they are worth."""


def numbers(samples: range, count: int) -> list[int]:
    """Whose random numbers the `count` candidates of images take; the first ones are those of the images themselves."""
    return [sample + STRIDE * candidate for sample in samples for candidate in range(count)]


def promising(
    engine: Engine,
    hidden: jax.Array,
    keys: jax.Array,
    settings: paint.Denoising,
    guidance_scale: float,
    reference: Reference | None,
    judge: Judge,
    count: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The better half of every `count` candidates, as far as a few steps show it.

    All of them where the final image takes too few steps for a look to pay. Arguments as for `Engine.paint`.

    Returns:
      Rows i32[b], ascending, and f32[B], what each candidate was worth.
    """
    rows = np.arange(len(keys), dtype=np.int32)
    if count == 1 or settings.num_inference_steps < PAYS:
        return rows, np.zeros(len(keys), np.float32)
    few = dataclasses.replace(settings, num_inference_steps=STEPS)
    seen = engine.pixels(engine.paint(hidden, keys, few, guidance_scale, reference))
    scores = judge(images.to_uint8(fetch(seen)), rows)
    order = np.argsort(-scores.reshape(-1, count), axis=1, kind="stable")  # of equal ones the first
    better = np.sort(order[:, : -(-count // 2)], axis=1)
    return np.take_along_axis(rows.reshape(-1, count), better, axis=1).ravel(), scores


def keep(engine: Engine, arrays: Any, rows: np.ndarray) -> Any:
    """The rows i32[b] of a tree of arrays [B ...] on the devices."""
    with engine.scope():
        return engine.run("denoise", _kept, arrays, rows)


@jax.jit
def _kept(arrays: Any, rows: jax.Array) -> Any:
    return jax.tree.map(lambda x: constrain(x[rows], "batch", *(None,) * (x.ndim - 1)), arrays)


def best(scores: np.ndarray, each: int) -> np.ndarray:
    """Which of the scores f32[b] are the best among every `each`, of equal ones the first."""
    return scores.reshape(-1, each).argmax(axis=1) + np.arange(0, len(scores), each)
