"""Evaluation of many images: a row per image, as in GenEval's results files, and scores."""

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
    """Rows of all images, and scores by task (see `geneval.summarize`)."""

    rows: list[dict]
    official: dict[str, Score]  # by GenEval's rule
    strict: dict[str, Score]  # by the strict rule

    def table(self) -> str:
        """Formats the scores, one line per task."""
        lines = [f"{'task':16}{'official':>32}{'strict':>32}"]
        lines += [f"{task:16}{self.official[task]!s:>32}{self.strict[task]!s:>32}" for task in self.official]
        return "\n".join(lines)

    def write(self, path: str | os.PathLike) -> None:
        """Writes the rows as JSON lines."""
        write_whole(path, json_lines(self.rows))


def json_lines(rows: Iterable[Mapping]) -> str:
    """Formats objects as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def judge_image(name: str, metadata: Mapping, image: np.ndarray, detector: Detector, thresholds: Thresholds) -> dict:
    """Evaluates one image uint8[Y X 3] by the metadata of its prompt in GenEval's schema.

    Returns:
      The columns of GenEval's results files, followed by `strict`, `reward` and `detections`.
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
    """Evaluates a folder in GenEval's layout; the thresholds default to those of the detector.

    Raises:
      UserError: the folder is not complete.
    """
    return judge_entries(folder.read_folder(out), detector, thresholds or detectors.thresholds_of(detector))


def judge_entries(entries: Iterable[folder.Entry], detector: Detector, thresholds: Thresholds) -> Report:
    """Evaluates the entries of a folder."""
    rows = [
        judge_image(str(path), entry.metadata, np.asarray(load_image(path)), detector, thresholds)
        for entry in entries
        for path in entry.images
    ]
    scores = [
        geneval.summarize((row["tag"], row["prompt"], row[rule]) for row in rows) for rule in ("correct", "strict")
    ]
    return Report(rows, *scores)
