"""Self-test of the verifier: it must recognise clean images of the demo world."""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from blip3o_jax.demo.world import prompts
from blip3o_jax.demo.world.reader import read_text
from blip3o_jax.demo.world.render import render
from blip3o_jax.demo.world.scenes import UNITS, Object, Scene, Sign
from blip3o_jax.demo.world.verifier import SIGN, THRESHOLD, detect, distance
from blip3o_jax.detection import Detection
from blip3o_jax.errors import UserError

REQUIRED = 0.995
CONDITIONS = {"clean": (0.0, 0.0), "blur 0.5, noise 4": (0.5, 4.0), "blur 1, noise 8": (1.0, 8.0)}
"""Condition -> standard deviations of blur in pixels and of noise in grey levels, at 64 pixels."""
_REACH = 3.0  # largest distance in units of a detection from its object


@dataclasses.dataclass(frozen=True)
class SelfTest:
    """Fractions of images that the verifier recognised without errors."""

    count: int
    shares: dict[str, float]  # condition -> fraction
    by_task: dict[str, float]  # task -> fraction of clean images

    @property
    def passed(self) -> bool:
        """Whether at least REQUIRED of the clean images are recognised, overall and in every task."""
        return min(self.shares["clean"], *self.by_task.values()) >= REQUIRED

    def require(self) -> None:
        """Raises UserError if the self-test has failed."""
        if not self.passed:
            raise UserError(
                "verifier's self-test",
                got=f"{self.by_task} right of {self.count} clean images",
                expected=f"at least {REQUIRED} in every task",
                do="do not trust scores of this installation; check numpy and Pillow",
            )

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in self.shares.items())
        return f"verifier's self-test over {self.count} images: {shares}"


def degrade(image: np.ndarray, blur: float, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Blurs an image uint8[Y X 3] and adds noise.

    Args:
      image: the image.
      blur: standard deviation in pixels.
      noise: standard deviation in grey levels.
      rng: random generator.
    """
    if blur:
        image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(blur)))
    return np.rint(image + rng.normal(0, noise, image.shape)).clip(0, 255).astype(np.uint8) if noise else image


def describes(detections: list[Detection], text: str, scene: Scene, size: int = UNITS) -> bool:
    """Returns whether detections and text match a scene: all objects in place, no others, and the right letters."""
    if text != (scene.sign.text if scene.sign else ""):
        return False
    if scene.sign is not None:
        return [(d.label, d.color) for d in detections] == [(SIGN, scene.sign.color)]
    sure = all(detection.score >= THRESHOLD for detection in detections)
    return sure and in_place(scene.objects, detections, size, _REACH)


def in_place(
    things: Sequence[Object | Sign], detections: Sequence[Detection], size: int, reach: float, any_shape: bool = False
) -> bool:
    """Returns whether detections match things one to one by colour, shape and place.

    Args:
      things: objects or signs.
      detections: detections in an image.
      size: side of the image in pixels.
      reach: largest distance in units of a detection from its object.
      any_shape: ignore shapes.
    """
    left, scale = list(detections), size / UNITS
    for thing in things:
        for seen in left:
            same = seen.color == thing.color and (any_shape or seen.label == thing.shape)
            if same and distance(thing, seen, scale) <= reach:
                left.remove(seen)
                break
        else:
            return False
    return not left


def self_test(count: int = 300, seed: int = 12345, size: int = UNITS) -> SelfTest:
    """Runs the verifier on clean and degraded images of every task.

    Args:
      count: number of images, divided evenly among the tasks.
      seed: seed of the images.
      size: side of the images in pixels.
    """
    right: dict[str, list[bool]] = collections.defaultdict(list)
    by_task: dict[str, list[bool]] = collections.defaultdict(list)
    tasks = tuple(prompts.TASKS)
    for index in range(count):
        task = tasks[index % len(tasks)]
        scene = prompts.sample(index, seed, {task: 1.0}, "any").scene
        image = render(scene, size)
        for name, (blur, noise) in CONDITIONS.items():
            rng = np.random.default_rng((seed, index, 3))
            seen = degrade(image, blur * size / UNITS, noise, rng)
            right[name].append(describes(detect(seen), read_text(seen), scene, size))
        by_task[task].append(right["clean"][-1])
    shares = {name: float(np.mean(values)) for name, values in right.items()}
    return SelfTest(count, shares, {task: float(np.mean(values)) for task, values in by_task.items()})
