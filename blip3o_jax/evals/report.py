"""Judges many pictures at once: one row a picture, as GenEval's results files have it, and scores over all."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from blip3o_jax.data.images import load_image
from blip3o_jax.detection import Detector
from blip3o_jax.evals import geneval, layout
from blip3o_jax.evals.geneval import Score, Thresholds
from blip3o_jax.files import write_whole


@dataclasses.dataclass(frozen=True)
class Report:
    """Rows of all pictures and their scores."""

    rows: list[dict]
    official: dict[str, Score]  # at least the asked objects, as GenEval counts
    strict: dict[str, Score]  # exactly the asked objects

    def table(self) -> str:
        """The scores as aligned text, one task a line."""
        lines = [f"{'task':16}{'official':>32}{'strict':>32}"]
        lines += [f"{task:16}{self.official[task]!s:>32}{self.strict[task]!s:>32}" for task in self.official]
        return "\n".join(lines)

    def write(self, path: str | os.PathLike) -> None:
        """Writes the rows as JSON lines."""
        write_whole(path, json_lines(self.rows))


def json_lines(rows: Iterable[Mapping]) -> str:
    """One object a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def judge_picture(
    name: str, metadata: Mapping, image: np.ndarray, detector: Detector, thresholds: Thresholds
) -> dict[str, Any]:
    """The row of one picture, with its verdict and everything that was found; arguments as for `judge_pictures`."""
    detections = detector(image)
    verdict = geneval.judge(detections, metadata, thresholds)
    return {
        "filename": name,
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        **dataclasses.asdict(verdict),
        "metadata": dict(metadata),
        "details": [{**dataclasses.asdict(d), "box": list(d.box)} for d in detections],
    }


def judge_pictures(
    pictures: Iterable[tuple[str, Mapping, np.ndarray]], detector: Detector, thresholds: Thresholds
) -> Report:
    """Judges pictures of composition prompts.

    Args:
      pictures: (file name, metadata in GenEval's schema, uint8[Y X 3]).
      detector: finds the objects.
      thresholds: of that detector.
    """
    rows = [judge_picture(*picture, detector, thresholds) for picture in pictures]
    scores = [
        geneval.summarize((row["tag"], row["prompt"], row[rule]) for row in rows) for rule in ("correct", "strict")
    ]
    return Report(rows, *scores)


def judge_folder(out: str | os.PathLike, detector: Detector, thresholds: Thresholds) -> Report:
    """Judges a folder in GenEval's layout.

    Raises:
      UserError: the folder is not complete.
    """
    entries = layout.read_folder(out)
    pictures = ((str(path), entry.metadata, np.asarray(load_image(path))) for entry in entries for path in entry.images)
    return judge_pictures(pictures, detector, thresholds)
