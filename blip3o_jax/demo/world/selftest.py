"""Self-test of the verifier: it must recognise clean images of the demo world."""

import collections
import dataclasses
import itertools

import numpy as np
from PIL import Image, ImageFilter

from blip3o_jax.demo.world import prompts
from blip3o_jax.demo.world.reader import read_text
from blip3o_jax.demo.world.render import render
from blip3o_jax.demo.world.scenes import UNITS, Scene
from blip3o_jax.demo.world.verifier import SIGN, THRESHOLD, detect, matched
from blip3o_jax.detection import Detection
from blip3o_jax.errors import require

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
        got = f"{self.by_task} right of {self.count} clean images"
        do = "do not trust scores of this installation; check numpy and Pillow"
        require(self.passed, "verifier's self-test", got, f"at least {REQUIRED} in every task", do)

    def __str__(self) -> str:
        shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in self.shares.items())
        return f"verifier's self-test over {self.count} images: {shares}"


def degrade(image: np.ndarray, blur: float, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Blurs an image uint8[Y X 3] and adds noise, of standard deviations in pixels and in grey levels."""
    if blur:
        image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(blur)))
    return np.rint(image + rng.normal(0, noise, image.shape)).clip(0, 255).astype(np.uint8) if noise else image


def describes(detections: list[Detection], text: str, scene: Scene, size: int = UNITS) -> bool:
    """Returns whether detections and text match a scene: all objects in place, no others, and the right letters."""
    if text != (scene.sign.text if scene.sign else ""):
        return False
    if scene.sign is not None:
        return [(d.label, d.color) for d in detections] == [(SIGN, scene.sign.color)]
    sure = len(detections) == len(scene.objects) and all(seen.score >= THRESHOLD for seen in detections)
    return sure and None not in matched(scene.objects, detections, size / UNITS, _REACH)


def self_test(count: int = 300, seed: int = 12345, size: int = UNITS) -> SelfTest:
    """Runs the verifier on `count` images of `size` pixels, divided evenly among the tasks, clean and degraded."""
    right: dict[str, list[bool]] = collections.defaultdict(list)
    by_task: dict[str, list[bool]] = collections.defaultdict(list)
    for index, task in zip(range(count), itertools.cycle(prompts.TASKS)):
        scene = prompts.sample(index, seed, {task: 1.0}, "any").scene
        image = render(scene, size)
        for name, (blur, noise) in CONDITIONS.items():
            rng = np.random.default_rng((seed, index, 3))
            seen = degrade(image, blur * size / UNITS, noise, rng)
            right[name].append(describes(detect(seen), read_text(seen), scene, size))
        by_task[task].append(right["clean"][-1])
    shares = {name: float(np.mean(values)) for name, values in right.items()}
    return SelfTest(count, shares, {task: float(np.mean(values)) for task, values in by_task.items()})
