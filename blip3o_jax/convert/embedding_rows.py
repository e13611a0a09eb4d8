"""Initialises the embedding rows of image tags, scale tokens and image codes, which follow the text tokens.

V rows, D width, Q codes of width E.

Source: transformers `resize_token_embeddings` (mean resizing) and BLIP3o-NEXT `initialize_vision_tokenizer`.
Differs from the reference:
1. Rows of tags and scales are drawn from the same Gaussian, but as random combinations of the centred rows, without the
   D x D covariance matrix.
2. The codebook of the image tokenizer can be projected to any width. The reference copies it if the widths are equal,
   which they are not in the released models.
"""

import math
from collections.abc import Iterator

import numpy as np

from blip3o_jax.config import TokenIds

VARIANCE = 1e-9  # factor of the covariance of the existing rows
CHUNK = 8192  # rows that are converted to float32 at a time


def extend_table(
    table: np.ndarray, ids: TokenIds, generator: np.random.Generator, codebook: np.ndarray | None = None
) -> np.ndarray:
    """Returns an embedding table with a row for every id, in the dtype of `table`.

    Rows up to the end tag are kept, including padding rows. Missing rows of tags and scales are drawn around their
    mean. Rows of image codes are the mean of all rows before them, plus the projected codebook if given.

    Args:
      table: float[V D], the existing rows.
      ids: token ids; tags, scales and codes are consecutive.
      generator: random generator of new rows and of the projection.
      codebook: f32[Q E], codebook of the image tokenizer.
    """
    kept = min(table.shape[0], ids.image_end_tag + 1)
    mean = _mean(table[:kept])
    out = np.empty((ids.image_start + ids.num_image_tokens, table.shape[1]), table.dtype)
    out[:kept] = table[:kept]
    out[kept : ids.image_start] = _around(table[:kept], mean, ids.image_start - kept, generator)
    before = out[: ids.image_start]
    codes = _mean(before)
    if codebook is not None:
        squares = sum(np.square(rows - mean).sum(dtype=np.float64) for rows in _chunks(before))
        codes = codes + project_codebook(codebook, table.shape[1], math.sqrt(squares / len(before)), generator)
    out[ids.image_start :] = codes
    return out


def project_codebook(codebook: np.ndarray, width: int, deviation: float, generator: np.random.Generator) -> np.ndarray:
    """Projects a centred codebook f32[Q E] to f32[Q D] by a random matrix with orthonormal rows or columns.

    Angles between codes are preserved for D = `width` >= E, and approximately for D < E. `deviation` is the root mean
    square of the row norms of the result.
    """
    size = max(width, codebook.shape[1])
    basis, _ = np.linalg.qr(generator.standard_normal((size, min(width, codebook.shape[1]))))
    projection = (basis.T if codebook.shape[1] <= width else basis).astype(np.float32)
    moved = (codebook - codebook.mean(axis=0)) @ projection
    return moved * (deviation / max(float(np.sqrt(np.square(moved).sum(axis=1).mean())), 1e-12))


def effective_codebook(table: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Returns the normalised codebook of SimVQ, f32[Q E] with unit rows.

    Args:
      table: float[Q E], the embedding.
      kernel: float[E E], the projection in PyTorch's layout.
      bias: float[E], the bias of the projection.
    """
    moved = table.astype(np.float32) @ kernel.astype(np.float32).T + bias.astype(np.float32)
    return moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)


def _chunks(table: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, table.shape[0], CHUNK):
        yield table[start : start + CHUNK].astype(np.float32)


def _mean(table: np.ndarray) -> np.ndarray:
    """Returns f32[D], the mean of the rows, summed in float64."""
    return table.mean(axis=0, dtype=np.float64).astype(np.float32)


def _around(table: np.ndarray, mean: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draws f32[count D] from the Gaussian of the rows, with its covariance multiplied by VARIANCE."""
    total = np.zeros((count, table.shape[1]), np.float32)
    for rows in _chunks(table):
        total += generator.standard_normal((count, rows.shape[0]), np.float32) @ (rows - mean)
    return mean + math.sqrt(VARIANCE / table.shape[0]) * total
