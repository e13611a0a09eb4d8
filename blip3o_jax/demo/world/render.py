"""Anti-aliased rendering of scenes of the demo world, at any size. Y X pixels."""

import functools

import numpy as np

from blip3o_jax.demo.world import font
from blip3o_jax.demo.world.scenes import COLORS, FRAME, UNITS, Background, Scene, Sign
from blip3o_jax.errors import require

SMALLEST = UNITS // 2  # side in pixels below which shapes are not distinguishable
BOARD = (253.0, 253.0, 251.0)
INK = (34.0, 34.0, 42.0)
_PALETTE = {name: np.array(rgb, np.float32) for name, rgb in COLORS.items()}


def render(scene: Scene, size: int = UNITS) -> np.ndarray:
    """Renders a scene as uint8[size size 3].

    Raises:
      UserError: `size`, the side of the image in pixels, is less than SMALLEST.
    """
    require(size >= SMALLEST, "image of the demo world", f"{size} pixels", f"at least {SMALLEST}", "use 64")
    scale = size / UNITS
    canvas = _background(scene.background, size)
    for item in scene.objects:
        alpha = _shape(item.shape, item.radius * scale, item.x * scale % 1, item.y * scale % 1)
        half = alpha.shape[0] // 2
        _blend(canvas, alpha, int(item.x * scale) - half, int(item.y * scale) - half, _PALETTE[item.color])
    if scene.sign is not None:
        _paint_sign(canvas, scene.sign, scale)
    return np.rint(canvas).astype(np.uint8)


def _background(background: Background, size: int) -> np.ndarray:
    ramp = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    plane = background.slope[0] * ramp[None, :] + background.slope[1] * ramp[:, None]
    return np.clip(plane[..., None] + np.array(background.color, np.float32), 0, 255)


def _blend(canvas: np.ndarray, alpha: np.ndarray, left: int, top: int, color) -> None:
    """Blends a colour into the canvas, clipped at its edges."""
    height, width = canvas.shape[:2]
    y0, y1 = max(top, 0), min(top + alpha.shape[0], height)
    x0, x1 = max(left, 0), min(left + alpha.shape[1], width)
    cover = alpha[y0 - top : y1 - top, x0 - left : x1 - left, None]
    area = canvas[y0:y1, x0:x1]
    area += cover * (np.asarray(color, np.float32) - area)


def _paint_sign(canvas: np.ndarray, sign: Sign, scale: float) -> None:
    letters = sign.lettering
    width, height = sign.size
    left, top = sign.x - width / 2, sign.y - height / 2
    x, y = round(left * scale), round(top * scale)
    _blend(canvas, _box(width * scale, height * scale, 3 * scale), x, y, _PALETTE[sign.color])
    inner = _box((width - 2 * FRAME) * scale, (height - 2 * FRAME) * scale, 1.5 * scale)
    _blend(canvas, inner, x + round(FRAME * scale), y + round(FRAME * scale), BOARD)
    beside, above = (FRAME + padding for padding in letters.padding)
    for i, letter in enumerate(sign.text):
        mask = font.glyph(letter, letters.width * scale, letters.height * scale, letters.stroke * scale)
        _blend(canvas, mask, x + round((beside + i * letters.pitch) * scale), y + round(above * scale), INK)


@functools.lru_cache(maxsize=64)
def _box(width: float, height: float, corner: float) -> np.ndarray:
    """Returns the coverage float32[Y X] of a rectangle with rounded corners."""
    y, x = np.mgrid[: int(np.ceil(height)), : int(np.ceil(width))] + 0.5
    beyond_x = np.abs(x - width / 2) - width / 2 + corner
    beyond_y = np.abs(y - height / 2) - height / 2 + corner
    outside = np.hypot(np.maximum(beyond_x, 0), np.maximum(beyond_y, 0)) - corner
    return np.clip(0.5 - outside, 0, 1).astype(np.float32)


@functools.lru_cache(maxsize=4096)
def _shape(shape: str, radius: float, fraction_x: float, fraction_y: float) -> np.ndarray:
    """Returns the coverage float32[Y X] of a shape whose centre is `fraction` pixels from the centre of the array."""
    half = int(np.ceil(radius * 1.1)) + 2
    y, x = np.mgrid[-half:half, -half:half] + 0.5
    signed = SHAPE_DISTANCES[shape]((x - fraction_x) / radius, (y - fraction_y) / radius) * radius
    return np.clip(0.5 - signed, 0, 1).astype(np.float32)


def _rectangle(x, y, half_width, half_height):
    beyond_x, beyond_y = np.abs(x) - half_width, np.abs(y) - half_height
    outside = np.hypot(np.maximum(beyond_x, 0), np.maximum(beyond_y, 0))
    return outside + np.minimum(np.maximum(beyond_x, beyond_y), 0)


def _polygon(x, y, corners):
    """Returns the signed distance to a polygon, negative inside."""
    nearest, inside = np.full(x.shape, np.inf), np.zeros(x.shape, bool)
    for start, end in zip(corners, np.roll(corners, -1, axis=0)):
        nearest = np.minimum(nearest, font.segment_distance(x, y, start, end))
        (ax, ay), (bx, by) = start, end
        crosses = (ay > y) != (by > y)
        inside ^= crosses & (x < (bx - ax) * (y - ay) / np.where(by == ay, 1, by - ay) + ax)
    return np.where(inside, -nearest, nearest)


_TRIANGLE = np.array([(0, -0.98), (1.0, 0.86), (-1.0, 0.86)])
_TURNS, _REACH = np.arange(10) * np.pi / 5, np.where(np.arange(10) % 2 == 0, 1.08, 0.48)
_STAR = np.stack([_REACH * np.sin(_TURNS), 0.08 - _REACH * np.cos(_TURNS)], axis=1)
SHAPE_DISTANCES = {
    "circle": lambda x, y: np.hypot(x, y) - 0.97,
    "square": lambda x, y: _rectangle(x, y, 0.88, 0.88),
    "triangle": lambda x, y: _polygon(x, y, _TRIANGLE),
    "star": lambda x, y: _polygon(x, y, _STAR),
    "cross": lambda x, y: np.minimum(_rectangle(x, y, 0.98, 0.33), _rectangle(x, y, 0.33, 0.98)),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.74) - 0.25,
}
"""Shape -> function of (x, y), relative to centre and radius: signed distance from the outline, in radii."""
