"""Reconstructs an image with the autoencoder, from its image tokens, and with the whole model, side by side.

The image tokens are decoded by the diffusion model, from the image's own codes under an empty caption.
"""

import dataclasses
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from blip3o_jax.data import images
from blip3o_jax.generate import stages
from blip3o_jax.generate.engine import Progress
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.generate.settings import image_size, make_settings
from blip3o_jax.pipeline import Pipeline

LABEL_SHARE = 12  # height of a panel relative to its label
SMALLEST_PANEL = 256  # pixels; smaller images are enlarged


@dataclasses.dataclass(frozen=True)
class Panel:
    """One reconstruction of an image."""

    name: str
    image: np.ndarray  # uint8[Y X 3]
    psnr: float  # dB against the original
    ssim: float


def reconstruct(
    pipeline: Pipeline, image: Image.Image, text: str = "", progress: Progress | None = None, **settings: Any
) -> list[Panel]:
    """Returns the original image and its reconstructions.

    Args:
      image: an image of any size, to be scaled and cropped to the model's.
      text: instruction for the whole model; default: keep the image.
      progress, **settings: as in `Pipeline.__call__`; one image per panel is generated.
    """
    settings["num_images_per_prompt"] = 1
    checked = make_settings(**settings)
    size = image_size(pipeline.config, checked)
    target = images.target_pixels(image, *size)
    original = images.to_uint8(target)
    cropped = Image.fromarray(original)
    (rendered,) = pipeline.render([Prompt("t2i", "", target=cropped)], progress, **settings)
    whole = pipeline.answer([Prompt("reconstruct", text, (cropped,))], progress, **settings)
    engine = pipeline.engine(checked, size)
    if checked.tiling:
        pixels = engine.pixels(engine.encode(target[None]))
    else:
        pixels = engine.stage("autoencoder", stages.round_trip, target[None])
    versions = {
        "autoencoder": images.to_uint8(np.asarray(pixels)[0]),
        "image tokens": np.asarray(rendered.images[0]),
        "whole model": np.asarray(whole.images[0]),
    }
    panels = [Panel("original", original, float("inf"), 1.0)]
    for name, version in versions.items():
        panels.append(Panel(name, version, images.psnr(original, version), images.ssim(original, version)))
    return panels


def table(panels: list[Panel]) -> str:
    """Formats PSNR and SSIM of every reconstruction."""
    rows = [f"{'':14}{'PSNR / dB':>10}{'SSIM':>8}"]
    rows += [f"{panel.name:14}{panel.psnr:10.2f}{panel.ssim:8.4f}" for panel in panels[1:]]
    return "\n".join(rows)


def sheet(panels: list[Panel]) -> Image.Image:
    """Draws the labelled panels side by side."""
    drawn = [_labelled(panel) for panel in panels]
    return Image.fromarray(images.grid([np.asarray(image) for image in drawn], len(drawn)))


def _labelled(panel: Panel) -> Image.Image:
    image = Image.fromarray(panel.image)
    factor = -(-SMALLEST_PANEL // min(image.size))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    band = max(16, image.height // LABEL_SHARE)
    canvas = Image.new("RGB", (image.width + 4, image.height + band), "white")
    canvas.paste(image, (0, band))
    text = panel.name if np.isinf(panel.psnr) else f"{panel.name}  {panel.psnr:.1f} dB"
    ImageDraw.Draw(canvas).text((4, 1), text, fill="black", font=ImageFont.load_default(band * 0.7))
    return canvas
