"""Reconstructions of an image by the autoencoder, from its image tokens, and by the whole model, side by side.

The panel of the image tokens is rendered by the diffusion half from the image's own codes under an empty caption.
"""

import dataclasses
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from blip3o_jax.data import images
from blip3o_jax.generate import stages
from blip3o_jax.generate.engine import Progress
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.generate.settings import Settings, image_size, make_settings
from blip3o_jax.pipeline import Pipeline

LABEL_SHARE = 12  # a label is as high as this fraction of a panel
SMALLEST_PANEL = 256  # pixels; smaller images are enlarged


@dataclasses.dataclass(frozen=True)
class Panel:
    """One stage's version of an image."""

    name: str
    picture: np.ndarray  # uint8[Y X 3]
    psnr: float  # dB against the original
    ssim: float


def reconstruct(
    pipeline: Pipeline, image: Image.Image, text: str = "", progress: Progress | None = None, **settings: Any
) -> list[Panel]:
    """The original, and what each stage keeps of it.

    Args:
      pipeline: a model.
      image: of any size; it is scaled and cropped to the model's.
      text: instruction of the whole model; default: to keep the image.
      progress, **settings: as for a call of the pipeline; one image per panel in any case.
    """
    settings["num_images_per_prompt"] = 1
    checked = make_settings(**settings)
    size = image_size(pipeline.config, checked)
    target = images.target_pixels(image, *size)
    original = images.to_uint8(target)
    cropped = Image.fromarray(original)
    (rendered,) = pipeline.render([Prompt("t2i", "", target=cropped)], progress, **settings)
    versions = {
        "autoencoder": _round_trip(pipeline, target, checked, size),
        "image tokens": np.asarray(rendered.images[0]),
        "whole model": np.asarray(
            pipeline.answer([Prompt("reconstruct", text, (cropped,))], progress, **settings).images[0]
        ),
    }
    panels = [Panel("original", original, float("inf"), 1.0)]
    for name, version in versions.items():
        panels.append(Panel(name, version, images.psnr(original, version), images.ssim(original, version)))
    return panels


def _round_trip(pipeline: Pipeline, target: np.ndarray, settings: Settings, size: tuple[int, int]) -> np.ndarray:
    engine = pipeline.engine(settings, size)
    if settings.tiling:
        pixels = engine.pixels(engine.encode(target[None]))
    else:
        pixels = engine.stage("autoencoder", stages.round_trip, target[None])
    return images.to_uint8(np.asarray(pixels)[0])


def table(panels: list[Panel]) -> str:
    """PSNR and SSIM of every stage, as text."""
    rows = [f"{'':14}{'PSNR / dB':>10}{'SSIM':>8}"]
    rows += [f"{panel.name:14}{panel.psnr:10.2f}{panel.ssim:8.4f}" for panel in panels[1:]]
    return "\n".join(rows)


def sheet(panels: list[Panel]) -> Image.Image:
    """The panels side by side, labelled."""
    drawn = [_labelled(panel) for panel in panels]
    return Image.fromarray(images.grid([np.asarray(picture) for picture in drawn], len(drawn)))


def _labelled(panel: Panel) -> Image.Image:
    picture = Image.fromarray(panel.picture)
    factor = -(-SMALLEST_PANEL // min(picture.size))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    band = max(16, picture.height // LABEL_SHARE)
    canvas = Image.new("RGB", (picture.width + 4, picture.height + band), "white")
    canvas.paste(picture, (0, band))
    text = panel.name if np.isinf(panel.psnr) else f"{panel.name}  {panel.psnr:.1f} dB"
    ImageDraw.Draw(canvas).text((4, 1), text, fill="black", font=ImageFont.load_default(band * 0.7))
    return canvas
