"""Reads and writes images on the host, converts them to model pixels, and measures their similarity.

Y X pixels. Model pixels are float32 in [-1, 1], images uint8 in [0, 255].

Source: transformers `SiglipImageProcessor` (tokenizer input); torchvision `Resize`, `CenterCrop`, `ToTensor` on PIL
images (target); SSIM: Wang et al. 2004, section III.C.
Differs from the reference: 1. EXIF orientation is applied, colours as in `colour`; 2. targets of any height and width;
3. optionally the tokenizer reads the crop of the target instead of the whole image.
"""

import contextlib
import functools
import io
import math
import os
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np
import scipy
from PIL import Image, ImageOps, PngImagePlugin

from blip3o_jax.data import colour
from blip3o_jax.errors import UserError, require, type_of
from blip3o_jax.files import output_file, read_bytes, write_whole

Source = str | os.PathLike | bytes | BinaryIO | np.ndarray | Image.Image

FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "PSD"),
    *("QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP", "XBM"),
)
"""Pillow's names of the formats that are read: those with its own decoders, which start no other program."""

MAX_FILE_BYTES = 2**29
MAX_PROFILE_BYTES = 2**24
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
MAX_RESIZED_PIXELS = 2**27  # limit for extreme aspect ratios, whose shorter side is resized to the target
SSIM_WINDOW, SSIM_SIGMA, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # from half the limit of `load_image` on


@functools.cache
def _readable_formats() -> list[str]:
    """Returns the FORMATS that this build of Pillow supports; MPO is opened as JPEG."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@functools.cache
def suffixes() -> tuple[str, ...]:
    """Returns the suffixes of files that `load_image` reads, lower case with the dot."""
    Image.init()
    return tuple(sorted(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS))


def is_image(name: str) -> bool:
    """Returns whether a file name has the suffix of an image."""
    return os.path.splitext(name)[1].lower() in suffixes()


def load_image(source: Source) -> Image.Image:
    """Reads an image as upright 8-bit sRGB, in mode RGB.

    Of an animation the first frame is read; transparency is composited on white; embedded profiles, palettes, grey (8
    and 16 bits), CMYK, Lab and other colour spaces are converted.

    Args:
      source: a path, encoded bytes, a binary file, pixels uint8[Y X 3], or a PIL image (not modified).

    Raises:
      UserError: the image is missing, empty, unreadable, truncated, of more than 2 * PIL.Image.MAX_IMAGE_PIXELS pixels
        (179 million by default), or has floating-point pixels; or an array of another type or shape.
    """
    if isinstance(source, np.ndarray):
        good = source.dtype == np.uint8 and source.ndim == 3 and source.shape[2] == 3 and source.size
        require(good, "image", type_of(source), "uint8[Y X 3]", "convert it")
        return Image.fromarray(source)
    name, content = _content(source)
    image = source if content is None else _opened(name, content)
    filled, got = image.width and image.height, f"{name} of {image.width}x{image.height}"
    require(filled, "image", got, "pixels", "use another image")
    require(image.mode != "F", "image", f"{name} of floating-point pixels", "8 or 16 bits", "convert it first")
    try:
        return colour.to_srgb(_upright(image))
    except UserError:
        raise
    except Exception as error:  # decoders raise many types for a broken file
        raise _damaged(name, image, error) from error


def _content(source: Source) -> tuple[str, bytes | None]:
    """Returns the name of the source for messages, and its bytes; None for a PIL image."""
    if isinstance(source, Image.Image):
        return "the PIL image", None
    if isinstance(source, bytes):
        name, content = f"{len(source)} bytes", source
    elif isinstance(source, str | os.PathLike):
        name, content = os.fspath(source), read_bytes(source, "image", MAX_FILE_BYTES)
    else:
        name, content = str(getattr(source, "name", "the file")), source.read(MAX_FILE_BYTES + 1)
    got = f"{name} of more than {MAX_FILE_BYTES:,} bytes"
    require(len(content) <= MAX_FILE_BYTES, "image", got, "a smaller file", "scale it down first")
    require(content, "image", f"{name}, which is empty", "an image", "save or download it again")
    return name, content


def _opened(name: str, content: bytes, profile: bytes | None = None) -> Image.Image:
    """Decodes an image; `profile` replaces its embedded profile."""
    image = None
    try:
        image = Image.open(io.BytesIO(content), formats=_readable_formats())
        rawmode = image.tile[0][3] if image.tile else None
        colour.fit_transparency(image, rawmode)
        image.load()
        if rawmode == "LA;16B":  # Pillow decodes this grey mode to three channels
            image = image.convert("LA")
    except Image.DecompressionBombError as error:
        got, do = f"{name}: {error}", "scale it down first"
        raise UserError("image", got=got, expected="an image of ordinary size", do=do) from error
    except Exception as error:  # see load_image
        plain = _without_texts(content)
        if plain is not None:
            return _opened(name, *plain)
        if image is not None:
            raise _damaged(name, image, error) from error
        got, expected = f"{name}, which is not a readable image", "PNG, JPEG, WebP, AVIF, GIF or TIFF"
        raise UserError("image", got=got, expected=expected, do="convert it") from error
    if profile:
        image.info["icc_profile"] = profile
    return image


def _damaged(name: str, image: Image.Image, error: Exception) -> UserError:
    got = f"{name}, which is damaged or of an unknown kind ({image.mode}: {error})"
    return UserError("image", got=got, expected="a complete image", do="save or download it again")


def _without_texts(content: bytes) -> tuple[bytes, bytes | None] | None:
    """Separates a PNG from its texts and its profile, since Pillow rejects files with long or damaged ones.

    Returns:
      The PNG without them, and the profile or None; None for other formats, and for a PNG without texts and profile.
    """
    if not content.startswith(PNG_START):
        return None
    kept, profile, position = [PNG_START], None, len(PNG_START)
    while position < len(content):
        end = position + 12 + int.from_bytes(content[position : position + 4], "big")
        kind = content[position + 4 : position + 8]
        if kind not in PNG_TEXTS:
            kept.append(content[position:end])
        elif kind == b"iCCP":
            _, _, packed = content[position + 8 : end - 4].partition(b"\0")
            with contextlib.suppress(zlib.error):
                profile = zlib.decompressobj().decompress(packed[1:], MAX_PROFILE_BYTES)
        position = end
    plain = b"".join(kept)
    return None if len(plain) == len(content) else (plain, profile)


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation and removes it."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken metadata: viewers show the image as stored
        return image


def tokenizer_pixels(image: Image.Image, size: int, crop_first: tuple[int, int] | None = None) -> np.ndarray:
    """Makes the image tokenizer's input of an RGB image: a bicubic resize to a square that ignores the aspect ratio.

    `crop_first` is (height, width) of a target: the image is first cropped as `target_pixels` does, so that the codes
    describe what the target shows. None, as in the reference: the whole image.

    Returns:
      f32[size size 3] in [-1, 1].
    """
    box = None if crop_first is None else _visible_box(image, *crop_first)
    return _to_model(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def target_pixels(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Makes the autoencoder's input of an RGB image: a bilinear resize that covers height x width, then a centre crop.

    For a square target this equals the reference's resize of the shorter side and centre crop, including rounding.

    Returns:
      f32[height width 3] in [-1, 1].

    Raises:
      UserError: an extreme aspect ratio, with which the resized image would exceed MAX_RESIZED_PIXELS.
    """
    rows, columns, top, left = _cover(image, height, width)
    image = image.resize((columns, rows), Image.Resampling.BILINEAR)
    return _to_model(image.crop((left, top, left + width, top + height)))


def check_aspect(image: Image.Image, height: int, width: int) -> None:
    """Raises the UserError of `target_pixels` for an extreme aspect ratio, without the work."""
    _cover(image, height, width)


def _cover(image: Image.Image, height: int, width: int) -> tuple[int, int, int, int]:
    """Returns height and width after the resize, and top and left of the crop."""
    if height * image.width >= width * image.height:
        rows, columns = height, int(height * image.width / image.height)
    else:
        rows, columns = int(width * image.height / image.width), width
    got = f"{image.width}x{image.height}, which would become {columns}x{rows} to cover {width}x{height}"
    require(rows * columns <= MAX_RESIZED_PIXELS, "image", got, "a less extreme aspect ratio", "crop it first")
    return rows, columns, round((rows - height) / 2.0), round((columns - width) / 2.0)


def _visible_box(image: Image.Image, height: int, width: int) -> tuple[float, float, float, float]:
    """The part of an image that `target_pixels` keeps: left, top, right, bottom in its own pixels."""
    rows, columns, top, left = _cover(image, height, width)
    x, y = image.width / columns, image.height / rows
    return left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height)


def _to_model(image: Image.Image) -> np.ndarray:
    """RGB image -> f32[Y X 3] in [-1, 1]."""
    return (np.asarray(image, np.float32) / 255 - 0.5) / 0.5


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Converts model pixels to an image: float[... 3], [-1, 1], clipped -> uint8[... 3], rounded."""
    unit = (np.asarray(pixels, np.float32) / 2 + 0.5).clip(0, 1)
    return np.round(unit * 255).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio of two images uint8[Y X 3] in dB; inf if they are equal."""
    a, b = _alike(a, b)
    return decibels(float(np.mean((a - b) ** 2)))


def decibels(error: float) -> float:
    """Returns the peak signal-to-noise ratio in dB of a mean squared error in grey levels; inf if it is 0."""
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the structural similarity of two images uint8[Y X 3], at most 1: the mean of `ssim_map`."""
    return float(np.mean(ssim_map(a, b)))


def ssim_map(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Computes structural similarity in every Gaussian window of 11x11 with standard deviation 1.5.

    Returns:
      f64[Y-10 X-10 3], at most 1, for windows within the images uint8[Y X 3].

    Raises:
      UserError: different shapes, or a side below 11.
    """
    a, b = _alike(a, b)
    got = f"an image of shape {a.shape}"
    require(min(a.shape[:2]) >= SSIM_WINDOW, "ssim", got, "sides of at least 11", "use larger ones")
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = (SSIM_K1 * 255) ** 2, (SSIM_K2 * 255) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return luminance * structure


def _alike(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns two images of equal shapes as float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    require(a.shape == b.shape, "images", f"shapes {a.shape} and {b.shape}", "equal shapes", "resize one")
    return a, b


def _blur(x: np.ndarray) -> np.ndarray:
    """f64[Y X C] -> f64[Y-10 X-10 C], Gaussian-weighted means."""
    half = SSIM_WINDOW // 2
    return scipy.ndimage.gaussian_filter(x, (SSIM_SIGMA, SSIM_SIGMA, 0), radius=half)[half:-half, half:-half]


def grid(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Arranges images uint8[Y X 3] in rows of at most `columns`, on white; returns uint8[rows*Y columns*X 3].

    A cell has the largest size, with its image at the top left. Raises UserError for no images or columns.
    """
    got = f"{len(images)} images in {columns} columns"
    require(len(images) and columns >= 1, "grid", got, "at least 1 of both", "add one")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height, width = max(len(image) for image in images), max(image.shape[1] for image in images)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * height, index % columns * width
        sheet[top : top + len(image), left : left + image.shape[1]] = image
    return sheet


def png_bytes(image: np.ndarray | Image.Image, metadata: Mapping[str, str] | None = None) -> bytes:
    """Encodes uint8[Y X 3] or a PIL image as a PNG.

    `metadata` is keyword -> text, stored as tEXt, or as iTXt if the text is not Latin-1.
    """
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    entries = PngImagePlugin.PngInfo()
    for key, text in (metadata or {}).items():
        try:
            entries.add_text(key, text.encode("latin-1"))
        except UnicodeEncodeError:
            entries.add_itxt(key, text)
    content = io.BytesIO()
    image.save(content, format="PNG", pnginfo=entries)
    return content.getvalue()


def save_png(
    image: np.ndarray | Image.Image, path: str | os.PathLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes the result of `png_bytes` atomically, and creates missing directories."""
    content = png_bytes(image, metadata)
    output_file(path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
