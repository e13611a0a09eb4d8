"""Rule-based detector of the demo world's objects: shape, colour and box.

The background is a plane fitted to pixels similar to the border. Connected regions of other pixels are candidates. The
colour of a region is the nearest of the palette, possibly mixed with the background; its shape is that of the best
template, sharp or blurred, stretched to its box. A region around dark neutral strokes is a sign. Images are first
resized to 64 pixels on the shorter side, one pixel per unit. Y X pixels.
"""

import functools
from collections.abc import Sequence

import numpy as np
import scipy
from PIL import Image, ImageFilter

from blip3o_jax.demo.world import windows
from blip3o_jax.demo.world.render import INK, render
from blip3o_jax.demo.world.scenes import COLORS, RADII, SHAPES, UNITS, Object, Scene, Sign
from blip3o_jax.detection import Detection
from blip3o_jax.errors import require

SIGN = "sign"
THRESHOLD = 0.3  # lowest confidence of an object
INK_DARKNESS = 0.35  # lowest darkness of strokes; 0: board, 1: ink

_CONTRAST = 60.0  # distance in RGB from the background at which a pixel is foreground
_MIN_AREA = 14
_DOUBTFUL = 0.5  # confidence of the shape below which a region may be two objects
_BOARD_LEVEL = 245.0
_CELLS = 16
_PALETTE = np.array(list(COLORS.values()), np.float32)
_NAMES = tuple(COLORS)
_BLURS = (0.0, 1.2)  # of the templates, standard deviations in pixels
_INK_AREA = 4  # minimum pixels of a stroke
_INK_COLOR = 35.0  # maximum mean difference between the channels of a stroke
_SIGN_INK = 12  # minimum pixels of ink on a sign
_SIGN_REACH = 9  # pixels from the letters to the outside of the frame


class Region:
    """A connected region of the foreground with its coverage map."""

    def __init__(self, picture: "Picture", labels: np.ndarray, number: int):
        ys, xs = np.nonzero(labels == number)
        contrast = picture.contrast[ys, xs]
        core = contrast >= 0.9 * np.sort(contrast)[int(0.8 * len(contrast))]
        ys_core, xs_core = ys[core], xs[core]
        self.background = picture.background[ys_core, xs_core].mean(axis=0)
        self.paint = picture.pixels[ys_core, xs_core].mean(axis=0)
        self.top, self.left = max(ys.min() - 2, 0), max(xs.min() - 2, 0)
        window = np.s_[self.top : ys.max() + 3, self.left : xs.max() + 3]
        direction = self.paint - self.background
        alpha = (picture.pixels[window] - picture.background[window]) @ (direction / (direction @ direction))
        foreign = (labels[window] != number) & (labels[window] != 0)
        self.alpha = np.where(foreign, 0, alpha.clip(0, 1))

    @functools.cached_property
    def inner_box(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 within the window; empty if no pixel is at least half covered."""
        if self.alpha.max() < 0.5:
            return 0.0, 0.0, 0.0, 0.0
        (x0, x1), (y0, y1) = (windows.extent(self.alpha.max(axis=axis)) for axis in (0, 1))
        return x0, y0, x1, y1

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 in the resized image."""
        x0, y0, x1, y1 = self.inner_box
        return x0 + self.left, y0 + self.top, x1 + self.left, y1 + self.top

    @functools.cached_property
    def color(self) -> tuple[str, float]:
        """The nearest colour of the palette, and a confidence in [0, 1]."""
        return nearest_color(self.paint, self.background, least_share=0.7)

    @functools.cached_property
    def shape(self) -> tuple[str, float]:
        """The best template, and a confidence in [0, 1]."""
        x0, y0, x1, y1 = self.inner_box
        width, height = x1 - x0, y1 - y0
        if min(width, height) < 5 or max(width, height) > 1.5 * min(width, height):
            return SHAPES[0], 0.0
        cells = windows.resample(self.alpha, self.inner_box, (_CELLS, _CELLS))
        overlap = np.minimum(cells, templates()).sum(axis=(1, 2)) / np.maximum(cells, templates()).sum(axis=(1, 2))
        best = int(overlap.argmax())
        return SHAPES[best // len(_BLURS)], float(np.clip((overlap[best] - 0.5) / 0.35, 0, 1))


class Picture:
    """An image at one pixel per unit, separated into background and regions."""

    def __init__(self, image: np.ndarray):
        image = np.asarray(image)
        good = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        require(good, "image to verify", f"{image.dtype}{list(image.shape)}", "uint8[Y X 3]", "convert it first")
        self.scale = min(image.shape[:2]) / UNITS
        if self.scale != 1:
            size = [max(round(side / self.scale), 1) for side in (image.shape[1], image.shape[0])]
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        self.pixels = image.astype(np.float32)
        self.background = _fit_background(self.pixels)
        self.contrast = _length(self.pixels - self.background)

    @functools.cached_property
    def regions(self) -> list[Region]:
        """The regions of the foreground; if one resembles no shape, all are split where their coverage is low."""
        regions = self._split(self.contrast > _CONTRAST)
        if any(region.shape[1] < _DOUBTFUL for region in regions):
            return self._split(self._covered(regions))
        return regions

    def _split(self, mask: np.ndarray) -> list[Region]:
        """Returns the connected regions of a mask with at least _MIN_AREA pixels."""
        labels, count = scipy.ndimage.label(mask)
        areas = np.bincount(labels.ravel(), minlength=count + 1)
        return [Region(self, labels, number) for number in range(1, count + 1) if areas[number] >= _MIN_AREA]

    def _covered(self, regions: list[Region]) -> np.ndarray:
        """Returns the pixels that are at least half covered, which separates objects joined by blur."""
        mask = np.zeros(self.contrast.shape, bool)
        for region in regions:
            height, width = region.alpha.shape
            mask[region.top : region.top + height, region.left : region.left + width] |= region.alpha >= 0.5
        return mask

    @functools.cached_property
    def strongest(self) -> np.ndarray:
        """Maximum of the channels of every pixel."""
        red, green, blue = np.moveaxis(self.pixels, -1, 0)
        return np.maximum(np.maximum(red, green), blue)

    @functools.cached_property
    def spread(self) -> np.ndarray:
        """Difference between the maximum and minimum of the channels, averaged over 3 x 3 pixels."""
        red, green, blue = np.moveaxis(self.pixels, -1, 0)
        sharp = np.pad(self.strongest - np.minimum(np.minimum(red, green), blue), 1, mode="edge")
        rows = sharp[:-2] + sharp[1:-1] + sharp[2:]
        return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9

    @functools.cached_property
    def ink(self) -> np.ndarray:
        """Fraction of ink (dark and neutral) in every pixel, float[Y X]."""
        colorful = np.maximum(self.spread - 20, 0)
        return ((_BOARD_LEVEL - self.strongest - 1.5 * colorful) / (_BOARD_LEVEL - max(INK))).clip(0, 1)

    @functools.cached_property
    def letter_box(self) -> tuple[int, int, int, int] | None:
        """x0, y0, x1, y1 around all strokes; None if there are none."""
        dark = self.ink > INK_DARKNESS
        if dark.sum() < _SIGN_INK:
            return None
        for region in self.regions:
            if np.ptp(region.paint) > _INK_COLOR and min(region.shape[1], region.color[1]) >= _DOUBTFUL:
                height, width = region.alpha.shape  # a dark object with faded colour
                dark[region.top : region.top + height, region.left : region.left + width] = False
        labels, count = scipy.ndimage.label(dark)
        areas = np.bincount(labels.ravel(), minlength=count + 1)
        colorful = np.bincount(labels.ravel(), self.spread.ravel(), minlength=count + 1)
        stroke = (areas >= _INK_AREA) & (colorful < _INK_COLOR * areas)
        stroke[0] = False
        if areas[stroke].sum() < _SIGN_INK:
            return None
        ys, xs = np.nonzero(stroke[labels])
        return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1

    def sign(self) -> Detection | None:
        """Returns the sign around the letters; None if there are none."""
        if self.letter_box is None:
            return None
        left, top, right, bottom = _grown(self.letter_box)
        window = np.s_[max(top, 0) : bottom, max(left, 0) : right]
        pixels, contrast = self.pixels[window], self.contrast[window]
        colorful = (contrast > 0.5 * _CONTRAST) & (self.spread[window] > 40)
        if not colorful.any():
            return Detection(SIGN, "", self._scaled(self.letter_box), 0.0)
        ys, xs = np.nonzero(colorful)
        core = contrast[colorful] >= np.quantile(contrast[colorful], 0.6)
        paint, background = pixels[colorful][core].mean(axis=0), self.background[window][colorful][core].mean(axis=0)
        color, score = nearest_color(paint, background, least_share=0.4)
        x0, y0 = int(xs.min()) + max(left, 0), int(ys.min()) + max(top, 0)
        return Detection(SIGN, color, self._scaled((x0, y0, x0 + np.ptp(xs) + 1, y0 + np.ptp(ys) + 1)), round(score, 3))

    def objects(self) -> list[Detection]:
        """Returns all regions outside the sign."""
        found = []
        for region in self.regions:
            if self.letter_box is None or not _inside(region.box, _grown(self.letter_box)):
                (label, shape_score), (color, color_score) = region.shape, region.color
                found.append(Detection(label, color, self._scaled(region.box), round(min(shape_score, color_score), 3)))
        return found

    def _scaled(self, box) -> tuple[float, float, float, float]:
        return tuple(round(float(v * self.scale), 2) for v in box)


def nearest_color(paint: np.ndarray, background: np.ndarray, least_share: float) -> tuple[str, float]:
    """Classifies a colour, float[3] RGB in [0, 255], that may be mixed with its background.

    Returns:
      The colour of the palette, of which the mixture has a fraction of `least_share` or more; a confidence in [0, 1].
    """
    ideal, seen = _PALETTE - background, paint - background
    share = ((ideal @ seen) / np.square(ideal).sum(axis=1)).clip(least_share, 1.1)
    distance = np.sqrt(np.square(seen - share[:, None] * ideal).sum(axis=1))
    best = int(distance.argmin())
    return _NAMES[best], float(np.clip(1.6 - distance[best] / 50, 0, 1))


def _grown(box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = box
    return x0 - _SIGN_REACH, y0 - _SIGN_REACH, x1 + _SIGN_REACH, y1 + _SIGN_REACH


def _inside(box: tuple[float, ...], frame: tuple[int, ...]) -> bool:
    """Returns whether the centre of a box lies in a frame."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return frame[0] < x < frame[2] and frame[1] < y < frame[3]


def _fit_background(pixels: np.ndarray) -> np.ndarray:
    """Fits a plane float32[Y X 3] to the pixels that resemble the border."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    middle = np.median(border, axis=0)
    near = _length(pixels[::2, ::2] - middle) < 40
    columns = _plane(*pixels.shape[:2])
    chosen, values = columns[::2, ::2][near], pixels[::2, ::2][near]
    if len(chosen) < 100:
        return np.broadcast_to(middle, pixels.shape)
    return columns @ np.linalg.solve(chosen.T @ chosen, chosen.T @ values)


def _length(colors: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("yxc,yxc->yx", colors, colors))


@functools.lru_cache(maxsize=8)
def _plane(height: int, width: int) -> np.ndarray:
    """Returns (1, x, y) of every pixel: float32[Y X 3]."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return np.stack([np.ones_like(x), x, y], axis=-1)


@functools.lru_cache(maxsize=1)
def templates() -> np.ndarray:
    """Returns the coverage of every shape and blur on its box, float[6*2 16 16]."""
    result = []
    for shape in SHAPES:
        for blur in _BLURS:
            views = []
            for radius in RADII:
                image = Image.fromarray(render(Scene((Object(shape, "blue", 32, 32, radius),))))
                mask = np.asarray(image.filter(ImageFilter.GaussianBlur(blur))).astype(np.float32)[..., 0]
                alpha = (mask.max() - mask) / np.ptp(mask)
                (x0, x1), (y0, y1) = (windows.extent(alpha.max(axis=axis)) for axis in (0, 1))
                views.append(windows.resample(alpha, (x0, y0, x1, y1), (_CELLS, _CELLS)))
            result.append(np.mean(views, axis=0))
    return np.stack(result)


def distance(thing: Object | Sign, detection: Detection, scale: float) -> float:
    """Returns the distance of the centres along the farther axis in units; `scale` is the pixels per unit."""
    x, y = detection.center
    return max(abs(thing.x - x / scale), abs(thing.y - y / scale))


def matched(
    things: Sequence[Object | Sign],
    detections: Sequence[Detection],
    scale: float,
    reach: float,
    any_shape: bool = False,
    free: int | None = None,
) -> list[Detection | None]:
    """Returns a detection with the colour, shape and place of every thing, or None; no detection twice.

    Args:
      things, detections: expected objects or signs, and those found in an image.
      scale: pixels per unit.
      reach: largest distance in units of a detection from its object.
      any_shape: ignore shapes.
      free: index of an object that may be anywhere.
    """
    left, found = list(detections), []
    for number, thing in enumerate(things):
        found.append(None)
        for seen in left:
            same = seen.color == thing.color and (any_shape or seen.label == thing.shape)
            if same and (number == free or distance(thing, seen, scale) <= reach):
                left.remove(seen)
                found[-1] = seen
                break
    return found


def detect(image: np.ndarray) -> list[Detection]:
    """Detects the objects in an image uint8[Y X 3] of any size.

    Returns:
      All regions by falling confidence; those below THRESHOLD resemble no object of the demo world. A board with
      letters is one detection with the label "sign".

    Raises:
      UserError: the image has another dtype or shape.
    """
    picture = Picture(image)
    sign = picture.sign()
    return sorted(picture.objects() + ([sign] if sign else []), key=lambda detection: -detection.score)
