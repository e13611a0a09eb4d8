"""Pictures on the host: reading, the two pixel layouts of the model, quality measures, writing.

Shapes: Y X pixels. Model pixels are float32 in [-1, 1], pictures uint8 in [0, 255].

Source: transformers `SiglipImageProcessor` (tokenizer input); torchvision `Resize`, `CenterCrop`, `ToTensor` on PIL
images (target); SSIM: Wang et al. 2004, section III.C.
Differs from the reference: 1. EXIF orientation is applied, transparency is laid on white, 16-bit greys are scaled (the
reference's `convert("RGB")` ignores, drops and clips them); 2. targets of any height and width; 3. optionally the
tokenizer sees the crop that the target shows, not the whole squashed picture.
"""

import io
import os
import pathlib
import threading
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image, PngImagePlugin

from blip3o_jax.errors import UserError
from blip3o_jax.files import output_file

Source = str | os.PathLike | bytes | BinaryIO | np.ndarray | Image.Image

EXIF_ORIENTATION = 0x0112
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the stored picture upright."""

MAX_RESIZED_PIXELS = 2**27  # a strip of a picture would grow beyond any memory when its shorter side is fitted
SSIM_WINDOW, SSIM_SIGMA, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03


def load_image(source: Source) -> Image.Image:
    """Reads a picture as upright 8-bit RGB.

    Animations give their first frame; transparency is laid on white; palettes, grey (8 and 16 bits), CMYK and other
    colour spaces are converted.

    Args:
      source: a path, encoded bytes, a binary file, pixels uint8[Y X 3], or a PIL image (which stays as it is).

    Raises:
      UserError: missing, empty, unreadable, cut off, or too large to be a picture.
    """
    if isinstance(source, Image.Image):
        return _converted(source, "the PIL image")
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    name, content = _content(source)
    if not content:
        raise UserError("image", got=f"{name}, which is empty", expected="a picture", do="save or download it anew")
    try:
        image = Image.open(io.BytesIO(content))
    except Image.DecompressionBombError as error:
        raise UserError(
            "image", got=f"{name}: {error}", expected="a picture of ordinary size", do="scale it down first"
        ) from error
    except Exception as error:  # decoders raise whatever a broken file makes them raise
        raise UserError(
            "image",
            got=f"{name}, which is no readable picture",
            expected="PNG, JPEG, WebP, GIF or TIFF",
            do="convert it",
        ) from error
    return _converted(image, name)


def _content(source: Source) -> tuple[str, bytes]:
    """What to call the source in a message, and its bytes."""
    if isinstance(source, bytes):
        return f"{len(source)} bytes", source
    if not isinstance(source, str | os.PathLike):
        return str(getattr(source, "name", "the file")), source.read()
    try:
        return os.fspath(source), pathlib.Path(source).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError("image", got=f"{source}: {reason}", expected="a picture file", do="check the path") from error


def _converted(image: Image.Image, name: str) -> Image.Image:
    """Decodes; upright RGB."""
    if not image.width or not image.height:
        raise UserError(
            "image", got=f"{name} of {image.width}x{image.height}", expected="pixels", do="use another picture"
        )
    if image.mode == "F":
        raise UserError("image", got=f"{name} of floating-point pixels", expected="8 or 16 bits", do="convert it first")
    try:
        return _to_rgb(_upright(image))
    except Exception as error:  # see load_image
        raise UserError(
            "image",
            got=f"{name}, which is damaged or of an unknown kind ({image.mode}: {error})",
            expected="a whole picture",
            do="save or download it anew",
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation, which the result has no more."""
    image.load()
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # broken metadata of a sound picture: viewers show it as stored, and so do we
        orientation = None
    if orientation not in ORIENTATIONS:
        return image
    turned = image.transpose(ORIENTATIONS[orientation])
    turned.info.pop("exif", None)  # else it would be turned again by whoever is given it
    turned.getexif().pop(EXIF_ORIENTATION, None)
    return turned


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; transparency on white."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        return Image.fromarray(np.round(grey).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def tokenizer_pixels(image: Image.Image, size: int, crop_first: tuple[int, int] | None = None) -> np.ndarray:
    """Makes the image tokenizer's input: a bicubic resize to a square that ignores the aspect ratio.

    Args:
      image: RGB.
      size: side of the result.
      crop_first: (height, width) of a target: keep only the part of the picture that `target_pixels` keeps, so that
        the codes describe what the target shows. None, as the reference: the whole picture.

    Returns:
      f32[size size 3] in [-1, 1].
    """
    box = None if crop_first is None else _visible_box(image, *crop_first)
    return _to_model(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def target_pixels(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Makes the autoencoder's input: a bilinear resize that covers height x width, then the centre of it.

    For a square this is the reference's resize of the shorter side and centre crop, with the same rounding.

    Returns:
      f32[height width 3] in [-1, 1].

    Raises:
      UserError: a picture so narrow that the resized one would not fit into memory.
    """
    rows, columns, top, left = _cover(image, height, width)
    image = image.resize((columns, rows), Image.Resampling.BILINEAR)
    return _to_model(image.crop((left, top, left + width, top + height)))


def _cover(image: Image.Image, height: int, width: int) -> tuple[int, int, int, int]:
    """Height and width after the resize, top and left of the crop."""
    if height * image.width >= width * image.height:
        rows, columns = height, int(height * image.width / image.height)
    else:
        rows, columns = int(width * image.height / image.width), width
    if rows * columns > MAX_RESIZED_PIXELS:
        raise UserError(
            "image",
            got=f"{image.width}x{image.height}, which would become {columns}x{rows} to cover {width}x{height}",
            expected="a less extreme aspect ratio",
            do="crop it first",
        )
    return rows, columns, round((rows - height) / 2.0), round((columns - width) / 2.0)


def _visible_box(image: Image.Image, height: int, width: int) -> tuple[float, float, float, float]:
    """The part of a picture that `target_pixels` keeps: left, top, right, bottom in its own pixels."""
    rows, columns, top, left = _cover(image, height, width)
    x, y = image.width / columns, image.height / rows
    return left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height)


def _to_model(image: Image.Image) -> np.ndarray:
    """RGB picture -> f32[Y X 3] in [-1, 1]."""
    return (np.asarray(image, np.float32) / 255 - 0.5) / 0.5


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Converts model pixels to a picture: float[... 3], [-1, 1], clipped -> uint8[... 3], rounded."""
    unit = (np.asarray(pixels, np.float32) / 2 + 0.5).clip(0, 1)
    return np.round(unit * 255).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8[Y X 3] pictures in dB; inf where they are equal."""
    _check_alike(a, b)
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity of two uint8[Y X 3] pictures, at most 1: the mean of `ssim_map`."""
    return float(np.mean(ssim_map(a, b)))


def ssim_map(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Computes structural similarity in every Gaussian window of 11x11 with standard deviation 1.5.

    Args:
      a, b: uint8[Y X 3].

    Returns:
      f64[Y-10 X-10 3], whole windows only, at most 1.

    Raises:
      UserError: two shapes, or a side below 11.
    """
    _check_alike(a, b)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if min(a.shape[:2]) < SSIM_WINDOW:
        raise UserError(
            "ssim", got=f"a picture of shape {a.shape}", expected="sides of at least 11", do="use larger ones"
        )
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = (SSIM_K1 * 255) ** 2, (SSIM_K2 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return luminance * structure


def _check_alike(a: np.ndarray, b: np.ndarray) -> None:
    if np.shape(a) != np.shape(b):
        raise UserError(
            "pictures", got=f"shapes {np.shape(a)} and {np.shape(b)}", expected="equal ones", do="resize one"
        )


def _blur(x: np.ndarray) -> np.ndarray:
    """f64[Y X C] -> f64[Y-10 X-10 C], Gaussian-weighted means."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    window = np.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    window /= window.sum()
    for axis in (0, 1):
        count = x.shape[axis] - SSIM_WINDOW + 1
        x = sum(weight * x.take(range(i, i + count), axis) for i, weight in enumerate(window))
    return x


def grid(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Lays pictures out row by row on white.

    Args:
      images: uint8[Y X 3], one or more; sizes may differ, each cell has the largest, pictures sit at its top left.
      columns: pictures in a row; fewer where there are fewer pictures.

    Returns:
      uint8[rows*Y columns*X 3].
    """
    if not len(images) or columns < 1:
        raise UserError(
            "grid", got=f"{len(images)} pictures in {columns} columns", expected="at least 1 of both", do="add one"
        )
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height, width = max(len(image) for image in images), max(image.shape[1] for image in images)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * height, index % columns * width
        sheet[top : top + len(image), left : left + image.shape[1]] = image
    return sheet


def save_png(
    image: np.ndarray | Image.Image, path: str | os.PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a PNG with text entries; the file appears complete or not at all.

    Args:
      image: uint8[Y X 3] or a PIL image.
      path: where; missing directories are made.
      metadata: keyword -> text, stored as tEXt, or as iTXt where the text is not Latin-1.
    """
    path = output_file(path)
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    entries = PngImagePlugin.PngInfo()
    for key, text in (metadata or {}).items():
        try:
            entries.add_text(key, text.encode("latin-1"))
        except UnicodeEncodeError:
            entries.add_itxt(key, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        picture.save(aside, format="PNG", pnginfo=entries)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
