"""Scenes of the demo world: objects, signs, backgrounds, and their random placement.

Coordinates are in units: the canvas is 64 units wide and high at any size in pixels, x to the right, y down.
"""

import dataclasses
import itertools

import numpy as np

UNITS = 64
MARGIN = 2  # units between an object and the edge of the canvas
GAP = 3  # minimum units between the boxes of two objects
RADII = (9, 12)
PLACE_TRIES = 40  # random positions tried for an object

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {
    "red": (215, 35, 40),
    "orange": (245, 140, 25),
    "yellow": (238, 212, 40),
    "green": (40, 155, 65),
    "blue": (40, 90, 215),
    "purple": (125, 50, 170),
    "pink": (248, 130, 190),
    "brown": (115, 70, 35),
}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MAX_LETTERS = 5


@dataclasses.dataclass(frozen=True)
class Object:
    """A shape centred at (x, y)."""

    shape: str
    color: str
    x: int
    y: int
    radius: int  # half the side of its box

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x0, y0, x1, y1."""
        return self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius


@dataclasses.dataclass(frozen=True)
class Lettering:
    """Dimensions of the letters of a sign, in units."""

    width: int
    height: int
    pitch: int
    stroke: float
    padding: tuple[int, int]  # beside the letters, above and below them


LARGE_LETTERS = Lettering(width=12, height=17, pitch=16, stroke=2.7, padding=(4, 4))
NARROW_LETTERS = Lettering(width=7, height=17, pitch=8, stroke=2.0, padding=(2, 4))
FRAME = 2
SIGN_STEP = 8  # units between possible positions of a sign


@dataclasses.dataclass(frozen=True)
class Sign:
    """A white board with a coloured frame and one to five letters, centred at (x, y)."""

    text: str
    color: str
    x: int
    y: int

    @property
    def lettering(self) -> Lettering:
        """Large letters for up to three letters, else narrow ones."""
        return LARGE_LETTERS if len(self.text) <= 3 else NARROW_LETTERS

    @property
    def size(self) -> tuple[int, int]:
        """Width and height including the frame."""
        letters = self.lettering
        beside, above = (2 * (FRAME + padding) for padding in letters.padding)
        return (len(self.text) - 1) * letters.pitch + letters.width + beside, letters.height + above


@dataclasses.dataclass(frozen=True)
class Background:
    """A light background with a linear gradient."""

    color: tuple[float, float, float] = (246.0, 246.0, 244.0)  # RGB in the centre
    slope: tuple[float, float] = (0.0, 0.0)  # change in grey levels from edge to edge, along x and y


@dataclasses.dataclass(frozen=True)
class Scene:
    """The content of an image."""

    objects: tuple[Object, ...] = ()
    sign: Sign | None = None
    background: Background = Background()


def sample_background(rng: np.random.Generator) -> Background:
    """Draws a light background with a slight tint and gradient."""
    level, slope = rng.uniform(238, 250), rng.uniform(-5, 5, 2)
    tint = rng.uniform(-4, 4, 3)
    return Background(tuple(float(level + t) for t in tint), (float(slope[0]), float(slope[1])))


def place(rng: np.random.Generator, radius: int, others: tuple[Object, ...]) -> tuple[int, int] | None:
    """Draws a free position for an object; None if it finds none."""
    spots = rng.integers(MARGIN + radius, UNITS - MARGIN - radius + 1, (PLACE_TRIES, 2))
    free = np.ones(len(spots), bool)
    for other in others:
        apart = np.abs(spots - (other.x, other.y)).max(axis=1)
        free &= apart >= radius + other.radius + GAP
    first = int(free.argmax())
    return (int(spots[first, 0]), int(spots[first, 1])) if free[first] else None


def scatter(rng: np.random.Generator, kinds: list[tuple[str, str]]) -> tuple[Object, ...]:
    """Places one to four objects at random without overlap; `kinds` are their (shape, colour)."""
    while True:
        objects: tuple[Object, ...] = ()
        for shape, color in kinds:
            radius = RADII[int(rng.integers(len(RADII)))]
            spot = place(rng, radius, objects)
            if spot is None:
                break
            objects += (Object(shape, color, *spot, radius),)
        if len(objects) == len(kinds):
            return objects


def arrange(
    rng: np.random.Generator, first: tuple[str, str], second: tuple[str, str], relation: str
) -> tuple[Object, Object]:
    """Places two objects, (shape, colour), such that the first is in `relation` to the second and in no other."""
    radii = [RADII[int(i)] for i in rng.integers(len(RADII), size=2)]
    reach = UNITS - 2 * MARGIN - sum(radii)
    along = int(rng.integers(sum(radii) + GAP, reach + 1))
    drift = min(int(0.4 * along), UNITS - 2 * MARGIN - 2 * max(radii))
    across = int(rng.integers(-drift, drift + 1))
    sign_x, sign_y = RELATIONS[relation]
    offset = (sign_x * along, across) if sign_x else (across, sign_y * along)
    spot = [_between(rng, delta, radii) for delta in offset]
    ends = [(p + delta, p) for p, delta in zip(spot, offset)]
    (first_x, second_x), (first_y, second_y) = ends
    return Object(*first, first_x, first_y, radii[0]), Object(*second, second_x, second_y, radii[1])


def _between(rng: np.random.Generator, delta: int, radii: list[int]) -> int:
    """Draws a coordinate of the second object that keeps both on the canvas."""
    low = max(MARGIN + radii[1], MARGIN + radii[0] - delta)
    high = min(UNITS - MARGIN - radii[1], UNITS - MARGIN - radii[0] - delta)
    return int(rng.integers(low, high + 1))


def sign_spots(text: str) -> list[tuple[int, int]]:
    """Returns the possible centres of a sign: near the centre of the canvas, with its upper left corner on a grid.

    The grid is that of the patches of the embedded model's tokenizer, so that letters are cut into patches uniformly.
    """
    middles = []
    for side in Sign(text, "", 0, 0).size:
        corners = range(SIGN_STEP // 2, UNITS - MARGIN - side + 1, SIGN_STEP)
        near = [corner for corner in corners if abs(corner - (UNITS - side) / 2) <= SIGN_STEP]
        middles.append([corner + side // 2 for corner in near] or [UNITS // 2])
    return list(itertools.product(*middles))


def nearest_spot(text: str, x: int, y: int) -> tuple[int, int]:
    """Returns the possible centre of a sign nearest to (x, y)."""
    return min(sign_spots(text), key=lambda spot: (spot[0] - x) ** 2 + (spot[1] - y) ** 2)


def place_sign(rng: np.random.Generator, text: str, color: str) -> Sign:
    """Places a sign at random near the centre of the canvas; the longest are centred horizontally."""
    width, height = Sign(text, color, 0, 0).size
    reach = (0 if len(text) == MAX_LETTERS else 6, 6)
    spread = [min((UNITS - 2 * MARGIN - side) // 2, most) for side, most in zip((width, height), reach, strict=True)]
    x, y = (UNITS // 2 + int(rng.integers(-s, s + 1)) for s in spread)
    return Sign(text, color, *nearest_spot(text, x, y))
