"""New rows of an embedding table: tags, scales and image codes behind the text tokens.

V rows, D width, Q codes of width E.

Source: transformers `resize_token_embeddings` (mean resizing) and BLIP3o-NEXT `initialize_vision_tokenizer`.
Differs from the reference:
1. The few rows of tags and scales are drawn from the same Gaussian without forming its D x D covariance: a random
   combination of the centred rows has it.
2. The image tokenizer's codebook may be projected into the rows of the codes whatever the two widths are; the reference
   copies it only where they are equal, which they are not in the released models.
"""

import math
from collections.abc import Iterator

import numpy as np

from blip3o_jax.config import TokenIds

VARIANCE = 1e-9  # of a new row, as a share of the covariance of the old ones
CHUNK = 8192  # rows at a time


def extend_table(
    table: np.ndarray, ids: TokenIds, generator: np.random.Generator, codebook: np.ndarray | None = None
) -> np.ndarray:
    """A table with rows for every id, in the type of `table`.

    Rows of `table` up to the end tag are kept, including padding rows; rows beyond it are replaced. Tags and
    scales that have no row are drawn around the mean of those that stay, and every code is the mean of all rows before.

    Args:
      table: float[V D].
      ids: those of tags, scales and codes follow each other.
      generator: of the rows that are drawn.
      codebook: float32[Q E], to be projected into the rows of the codes.
    """
    kept = min(table.shape[0], ids.image_end_tag + 1)
    mean = _mean(table[:kept])
    out = np.empty((ids.image_start + ids.num_image_tokens, table.shape[1]), table.dtype)
    out[:kept] = table[:kept]
    out[kept : ids.image_start] = _around(table[:kept], mean, ids.image_start - kept, generator)
    codes = out[ids.image_start :]
    codes[...] = _mean(out[: ids.image_start])
    if codebook is not None:
        deviation = _deviation(out[: ids.image_start], mean)
        codes[...] = _mean(out[: ids.image_start]) + project_codebook(codebook, table.shape[1], deviation, generator)
    return out


def project_codebook(codebook: np.ndarray, width: int, deviation: float, generator: np.random.Generator) -> np.ndarray:
    """float32[Q D]: the centred codebook float32[Q E] under a random map with orthonormal rows or columns.

    Angles between codes stay as they are where D >= E, and nearly so where it is smaller.

    Args:
      width: D.
      deviation: root of the mean squared length of the result.
    """
    size = max(width, codebook.shape[1])
    basis, _ = np.linalg.qr(generator.standard_normal((size, min(width, codebook.shape[1]))))
    projection = (basis.T if codebook.shape[1] <= width else basis).astype(np.float32)
    moved = (codebook - codebook.mean(axis=0)) @ projection
    return moved * (deviation / max(float(np.sqrt(np.square(moved).sum(axis=1).mean())), 1e-12))


def effective_codebook(table: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """float32[Q E] of unit rows, from the tokenizer's table, its projection [E E] (as torch holds it) and bias [E]."""
    moved = table.astype(np.float32) @ kernel.astype(np.float32).T + bias.astype(np.float32)
    return moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)


def _chunks(table: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, table.shape[0], CHUNK):
        yield table[start : start + CHUNK].astype(np.float32)


def _mean(table: np.ndarray) -> np.ndarray:
    """float32[D]"""
    return (sum(rows.sum(axis=0, dtype=np.float64) for rows in _chunks(table)) / table.shape[0]).astype(np.float32)


def _deviation(table: np.ndarray, mean: np.ndarray) -> float:
    """Root of the mean squared distance of the rows to `mean`."""
    return math.sqrt(sum(np.square(rows - mean).sum(dtype=np.float64) for rows in _chunks(table)) / table.shape[0])


def _around(table: np.ndarray, mean: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """float32[count D], drawn from the Gaussian of the rows with its covariance shrunk."""
    total = np.zeros((count, table.shape[1]), np.float32)
    for rows in _chunks(table):
        total += generator.standard_normal((count, rows.shape[0]), np.float32) @ (rows - mean)
    return mean + math.sqrt(VARIANCE / table.shape[0]) * total
