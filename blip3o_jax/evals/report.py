"""Scores many images: one row per image, as in GenEval's results files, and overall scores."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping

import numpy as np

from blip3o_jax.data.images import load_image
from blip3o_jax.detection import Detector, Thresholds
from blip3o_jax.evals import detectors, folder, geneval
from blip3o_jax.evals.geneval import Score
from blip3o_jax.files import write_whole


@dataclasses.dataclass(frozen=True)
class Report:
    """Rows of all images and their scores."""

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


def judge_image(name: str, metadata: Mapping, image: np.ndarray, detector: Detector, thresholds: Thresholds) -> dict:
    """The row of one image: the columns of GenEval's own results files, and after them ours.

    Args:
      image: uint8[Y X 3].
    """
    detections = detector(image)
    verdict = geneval.judge(detections, metadata, thresholds)
    counted = geneval.group(detections, thresholds.of(metadata["tag"]))
    boxes = {label: [[*found.box, found.score] for found in group] for label, group in counted.items()}
    return {
        "filename": name,
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": verdict.correct,
        "reason": verdict.reason,
        "metadata": json.dumps(dict(metadata)),
        "details": json.dumps(boxes),
        "strict": verdict.strict,
        "reward": verdict.reward,
        "detections": [{**dataclasses.asdict(found), "box": list(found.box)} for found in detections],
    }


def judge_folder(out: str | os.PathLike, detector: Detector, thresholds: Thresholds | None = None) -> Report:
    """Judges a folder in GenEval's layout.

    Args:
      thresholds: least confidences; None for the detector's own.

    Raises:
      UserError: the folder is not complete.
    """
    return judge_entries(folder.read_folder(out), detector, thresholds or detectors.thresholds_of(detector))


def judge_entries(entries: Iterable[folder.Entry], detector: Detector, thresholds: Thresholds) -> Report:
    """Judges images of composition prompts; arguments as for `judge_folder`."""
    rows = [
        judge_image(str(path), entry.metadata, np.asarray(load_image(path)), detector, thresholds)
        for entry in entries
        for path in entry.images
    ]
    scores = [
        geneval.summarize((row["tag"], row["prompt"], row[rule]) for row in rows) for rule in ("correct", "strict")
    ]
    return Report(rows, *scores)
