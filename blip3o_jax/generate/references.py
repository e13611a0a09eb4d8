"""Reads reference images from files, bytes, PIL images and numpy, jax or torch arrays."""

import os
import warnings
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from blip3o_jax.data import images
from blip3o_jax.errors import UserError, type_of

CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
SHARED = "all {} images are references of every prompt"  # said if there are as many prompts
SHAPES = "[H W], [H W 1], [H W 3] or [H W 4]"


def references_of(image: Any, count: int) -> list[tuple[Any, ...]]:
    """Returns the references of every prompt.

    Args:
      image: shared by all prompts: None, an image as `image_of` accepts, a list of images, an array [N H W C] or an
        array of paths. A list that contains lists or such arrays has one entry per prompt.
      count: number of prompts; warns if as many images are shared by them.

    Raises:
      UserError: the number of lists differs from `count`, or an entry is not an image.
    """
    entries = _listed(image)
    if not any(isinstance(entry, list) for entry in entries):
        if len(entries) == count > 1:
            warnings.warn(f"{SHARED.format(count)}; for one each, give a list of lists", stacklevel=3)
        return [_read(entries)] * count
    if len(entries) != count:
        raise UserError(
            "image", got=f"{len(entries)} lists for {count} prompts", expected="one list per prompt", do="add or remove"
        )
    return [_read(_listed(entry)) for entry in entries]


def image_of(source: Any) -> Image.Image:
    """Reads an image as upright 8-bit RGB.

    Args:
      source: a path, encoded bytes, a binary file, a PIL image, or a numpy, jax or torch array: uint8, bool or floating
        point in [0, 1], of shape [H W], [H W 1], [H W 3] or [H W 4]; torch tensors also [C H W].

    Raises:
      UserError: an unsupported type or shape, values out of range, or an unreadable file.
    """
    if isinstance(source, (str, os.PathLike, bytes, Image.Image)) or hasattr(source, "read"):
        return images.load_image(source)
    return images.load_image(Image.fromarray(_as_uint8(_pixels(source))))


def _listed(image: Any) -> list:
    """Returns the entries of a list or batch of images; nested batches become lists."""
    if image is None:
        return []
    if isinstance(image, (list, tuple)):
        return [_listed(entry) if _is_several(entry) else entry for entry in image]
    return list(_array(image)) if _is_several(image) else [image]


def _is_several(entry: Any) -> bool:
    if isinstance(entry, np.ndarray) and entry.dtype.kind in "US":
        return entry.ndim > 0
    return entry is None or isinstance(entry, (list, tuple)) or getattr(entry, "ndim", 0) == 4


def _read(entries: Sequence[Any]) -> tuple[Any, ...]:
    """Reads a flat list of images."""
    if any(isinstance(entry, list) for entry in entries):
        raise UserError("image", got="lists within lists within lists", expected="one list per prompt", do="flatten it")
    return tuple(image_of(entry) for entry in entries)


def _array(source: Any) -> np.ndarray:
    if not hasattr(source, "__array__"):
        raise UserError(
            "image",
            got=type_of(source),
            expected="a path, a PIL image, an array, or a list of them",
            do="convert it",
        )
    try:
        return np.asarray(source)
    except Exception as error:  # raised by the array's library
        raise UserError(
            "image", got=f"an array that numpy cannot read ({error})", expected="one on the host", do="convert it"
        ) from error


def _pixels(source: Any) -> np.ndarray:
    """Converts a source to an array [H W] or [H W C]."""
    array = _array(source)
    channels_first = array.ndim == 3 and array.shape[0] in CHANNELS and array.shape[2] not in CHANNELS
    if channels_first and type(source).__module__.partition(".")[0] == "torch":
        return array.transpose(1, 2, 0)
    if array.ndim not in (2, 3) or not array.size or (array.ndim == 3 and array.shape[2] not in CHANNELS):
        advice = "transpose it to channels last" if channels_first else "reshape it"
        raise UserError("image", got=f"an array of shape {list(array.shape)}", expected=SHAPES, do=advice)
    return array


def _as_uint8(array: np.ndarray) -> np.ndarray:
    """Converts pixels to uint8[H W] or [H W C], C 3 or 4."""
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(np.float32)
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # also refuses NaN
            raise UserError(
                "image", got=f"floating-point pixels from {low:g} to {high:g}", expected="0 to 1", do="scale them"
            )
        return np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise UserError(
            "image", got=f"pixels of dtype {array.dtype}", expected="uint8, bool or floating point", do="convert them"
        )
    return array
