"""Converts images of any PIL mode and embedded profile to 8-bit sRGB on white.

Source: Pillow's ImageCms (littleCMS), perceptual intent.
Differs from the reference: its `convert("RGB")` ignores profiles, drops transparency and clips 16-bit greys.
"""

import functools
import io
import itertools

import numpy as np
from PIL import Image, ImageCms

from blip3o_jax.errors import require

GREY = ("1", "L", "LA", "La")
SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour space of a profile -> mode of its images."""

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def to_srgb(image: Image.Image) -> Image.Image:
    """Converts a decoded image of any mode but F to RGB without metadata.

    The embedded profile is applied and transparency composited on white. A profile that is damaged or for another mode
    is ignored, as in viewers. Values are unchanged if the profile equals sRGB within 1/255.

    Raises:
      UserError: integers of more than 16 bits.
    """
    colour, alpha = _split(image)
    result = _converted(colour, image.info.get("icc_profile"))
    if alpha is not None:
        result.putalpha(alpha)
        result = Image.alpha_composite(Image.new("RGBA", result.size, "white"), result).convert("RGB")
    result.info = {}  # has been applied
    return result


def fit_transparency(image: Image.Image, rawmode: object) -> None:
    """Converts the transparent colour of a PNG to 8 bits, as Pillow converts its pixels from `rawmode`."""
    value = image.info.get("transparency")
    if isinstance(value, int) and rawmode in ("L;2", "L;4"):
        image.info["transparency"] = (value & 3) * 85 if rawmode == "L;2" else (value & 15) * 17
    elif isinstance(value, tuple) and rawmode == "RGB;16B":
        image.info["transparency"] = tuple(channel >> 8 for channel in value)


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Returns the image without alpha, and alpha in mode L or None."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        small = values.min() >= 0 and values.max() <= 65535
        require(small, "image", "integers of more than 16 bits", "8 or 16 bits", "convert it first")
        grey = Image.fromarray(np.round(values / 257).astype(np.uint8))
        clear = image.info.get("transparency")
        alpha = None if clear is None else Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
        return grey, alpha
    if not image.has_transparency_data:
        return image, None
    if image.mode in GREY:
        return image.convert("LA").split()
    rgba = image.convert("RGBA")
    return rgba.convert("RGB"), rgba.getchannel("A")


def _converted(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts an image without alpha to RGB."""
    if image.mode == "LAB":
        lab = ImageCms.buildTransform(ImageCms.createProfile("LAB"), SRGB, "LAB", "RGB")
        return ImageCms.applyTransform(image, lab)
    found = _transform(profile, image.mode) if profile else None
    if found is None:
        return image.convert("RGB")
    mode, transform = found
    return ImageCms.applyTransform(image.convert(mode), transform)


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> tuple[str, ImageCms.ImageCmsTransform] | None:
    """Returns the mode of a profile and its transform to sRGB; None if it is not for `mode` or has no effect."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        takes = SPACES.get(opened.profile.xcolor_space.strip())
        if takes is None or (takes == "CMYK") != (mode == "CMYK") or (takes == "L" and mode not in GREY):
            return None
        transform = ImageCms.buildTransform(opened, SRGB, takes, "RGB")
        probe = _probe(takes)
        shown = np.asarray(ImageCms.applyTransform(probe, transform), int)
    except Exception:  # littleCMS and Pillow raise many types for a broken profile
        return None
    unchanged = takes != "CMYK" and np.abs(shown - np.asarray(probe.convert("RGB"), int)).max() <= 1
    return None if unchanged else (takes, transform)


def _probe(mode: str) -> Image.Image:
    """Returns an image of colours spread over a mode."""
    levels = bytes(range(0, 256, 15))
    colours = [bytes(colour) for colour in itertools.product(levels, repeat=len(mode) if mode == "RGB" else 1)]
    data = b"".join(colour * (len(mode) // len(colour)) for colour in colours)
    return Image.frombytes(mode, (len(colours), 1), data)
