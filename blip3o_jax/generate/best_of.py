"""Best-of-N sampling: a reward ranks cheap previews of the candidates, and the lower half is dropped before denoising.

P prompts, B rows: the N candidates of an image are adjacent; b rows that are left.

Source: GridAR (arXiv 2511.21185), which judges partial images while their tokens are decoded.
Differs from it:
1. Previews are rendered after all tokens are decoded: rewards of partially decoded images predict the final one poorly.
2. Dropped candidates are not replaced, so every candidate depends on its own random numbers only.
`benchmarks/best_of.py` measures both stages.
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

STEPS = 4  # denoising steps of a preview
PAYS = 3 * STEPS  # fewest denoising steps of the final image for which previews save time
STRIDE = 100_000  # candidate c of image i has the random numbers of image i + c * STRIDE

Judge = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(images uint8[b Y X 3], their row indices i32[b]) -> rewards f32[b]."""


def numbers(samples: range, count: int) -> list[int]:
    """Returns the sample numbers of the `count` candidates of images; candidate 0 has the image's own number."""
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
    """Selects the better half of every `count` candidates by previews.

    Keeps all of them if the final image takes too few steps for previews to pay. Other arguments as for `Engine.paint`.

    Returns:
      Row indices i32[b], ascending, and preview rewards f32[B] (zeros without previews).
    """
    rows = np.arange(len(keys), dtype=np.int32)
    if count == 1 or settings.num_inference_steps < PAYS:
        return rows, np.zeros(len(keys), np.float32)
    few = dataclasses.replace(settings, num_inference_steps=STEPS)
    seen = engine.pixels(engine.paint(hidden, keys, few, guidance_scale, reference))
    scores = judge(images.to_uint8(fetch(seen)), rows)
    order = np.argsort(-scores.reshape(-1, count), axis=1, kind="stable")  # the first of equals
    better = np.sort(order[:, : -(-count // 2)], axis=1)
    return np.take_along_axis(rows.reshape(-1, count), better, axis=1).ravel(), scores


def keep(engine: Engine, arrays: Any, rows: np.ndarray) -> Any:
    """Takes rows i32[b] of a tree of device arrays [B ...]."""
    with engine.scope():
        return engine.run("denoise", _kept, arrays, rows)


@jax.jit
def _kept(arrays: Any, rows: jax.Array) -> Any:
    return jax.tree.map(lambda x: constrain(x[rows], "batch", *(None,) * (x.ndim - 1)), arrays)


def best(scores: np.ndarray, each: int) -> np.ndarray:
    """Returns the index of the highest of every `each` scores f32[b], the first of equals."""
    return scores.reshape(-1, each).argmax(axis=1) + np.arange(0, len(scores), each)
