"""Reference images as people hold them: files, PIL images and arrays of many kinds."""

import os
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from blip3o_jax.data import images
from blip3o_jax.errors import UserError, type_of

CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
SHAPES = "[H W], [H W 1], [H W 3] or [H W 4]"


def references_of(image: Any, count: int) -> list[tuple[Any, ...]]:
    """The references of every prompt.

    Args:
      image: of all `count` prompts: None, an image as `image_of` takes it, a list of them or an array [N H W C]; or of
        each prompt, where any entry of a list is a list or such an array.

    Raises:
      UserError: lists whose number is not that of the prompts, or an entry that is no image.
    """
    entries = _listed(image)
    if not any(isinstance(entry, list) for entry in entries):
        return [_read(entries)] * count
    if len(entries) != count:
        raise UserError(
            "image", got=f"{len(entries)} lists for {count} prompts", expected="one list per prompt", do="add or remove"
        )
    return [_read(_listed(entry)) for entry in entries]


def image_of(source: Any) -> Image.Image:
    """Reads an image as upright 8-bit RGB.

    Args:
      source: a path, encoded bytes, a binary file, a PIL image, or an array of numpy, jax or torch, uint8, bool or
        floating point in [0, 1], of shape [H W], [H W 1], [H W 3] or [H W 4]; of torch also [C H W].

    Raises:
      UserError: something else, or an unreadable file.
    """
    if isinstance(source, (str, os.PathLike, bytes, Image.Image)) or hasattr(source, "read"):
        return images.load_image(source)
    return images.load_image(Image.fromarray(_as_uint8(_pixels(source))))


def _listed(image: Any) -> list:
    """The entries of a list or of a batch of images; nested ones are lists too."""
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
    """Images of entries, which are one level deep."""
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
    except Exception as error:  # of the library that the array is from
        raise UserError(
            "image", got=f"an array that numpy cannot read ({error})", expected="one on the host", do="convert it"
        ) from error


def _pixels(source: Any) -> np.ndarray:
    """The array [H W] or [H W C] of a source."""
    array = _array(source)
    channels_first = array.ndim == 3 and array.shape[0] in CHANNELS and array.shape[2] not in CHANNELS
    if channels_first and type(source).__module__.partition(".")[0] == "torch":
        return array.transpose(1, 2, 0)
    if array.ndim not in (2, 3) or not array.size or (array.ndim == 3 and array.shape[2] not in CHANNELS):
        advice = "transpose it to channels last" if channels_first else "reshape it"
        raise UserError("image", got=f"an array of shape {list(array.shape)}", expected=SHAPES, do=advice)
    return array


def _as_uint8(array: np.ndarray) -> np.ndarray:
    """Pixels uint8[H W] or [H W C], C 3 or 4."""
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(np.float32)
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # a NaN is neither
            raise UserError(
                "image", got=f"floating-point pixels from {low:g} to {high:g}", expected="0 to 1", do="scale them"
            )
        return np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise UserError(
            "image", got=f"pixels of dtype {array.dtype}", expected="uint8, bool or floating point", do="convert them"
        )
    return array
