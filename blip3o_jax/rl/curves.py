"""Rewards over steps as a picture, drawn from the records of a run."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT, MARGIN = 640, 320, 44
COLORS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (255, 127, 14), (148, 103, 189), (140, 86, 75))


def read_records(path: str | os.PathLike) -> list[dict]:
    """The records of metrics.jsonl; none where it is not there yet."""
    path = pathlib.Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:  # the line being written
            continue
    return records


def chosen(records: Sequence[Mapping]) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) of what is drawn: `reward`, and every `held_out/LABEL`."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in record.items():
            drawn = name == "reward" or (name.startswith("held_out/") and name.count("/") == 1)
            if drawn and isinstance(value, (int, float)):
                curves.setdefault(name, []).append((record["step"], float(value)))
    return curves


def draw_curves(records: Sequence[Mapping]) -> np.ndarray:
    """Draws rewards over steps.

    Args:
      records: of a run, each with its `step`.

    Returns:
      uint8[HEIGHT WIDTH 3].
    """
    curves = chosen(records)
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return np.asarray(picture)
    steps, values = zip(*points)
    left, right = min(steps), max(max(steps), min(steps) + 1)
    low, high = min(values), max(max(values), min(values) + 1e-6)

    def place(step, value):
        x = MARGIN + (step - left) / (right - left) * (WIDTH - 2 * MARGIN)
        return x, HEIGHT - MARGIN - (value - low) / (high - low) * (HEIGHT - 2 * MARGIN)

    draw.rectangle((MARGIN, MARGIN, WIDTH - MARGIN, HEIGHT - MARGIN), outline=(160, 160, 160))
    for value in (low, (low + high) / 2, high):
        draw.text((4, place(left, value)[1] - 6), f"{value:.3f}", fill="black")
    for step in (left, right):
        draw.text((place(step, low)[0] - 8, HEIGHT - MARGIN + 6), str(step), fill="black")
    for number, (name, curve) in enumerate(sorted(curves.items(), reverse=True)):
        color = COLORS[number % len(COLORS)]
        placed = [place(*point) for point in curve]
        draw.line(placed, fill=color, width=2) if len(placed) > 1 else draw.point(placed, fill=color)
        draw.text((MARGIN + 6 + 150 * (number % 4), 6 + 14 * (number // 4)), name, fill=color)
    return np.asarray(picture)
