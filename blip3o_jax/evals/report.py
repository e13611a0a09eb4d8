"""Evaluation of many images: a row per image, as in GenEval's results files, and scores."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from blip3o_jax.data.images import load_image
from blip3o_jax.detection import Detector, Thresholds
from blip3o_jax.evals import detectors, folder, geneval
from blip3o_jax.evals.geneval import Score
from blip3o_jax.files import append_line, read_text, write_whole


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


class Partial:
    """Rows of an interrupted evaluation, in a file that is removed when it is complete.

    Attributes:
      found: number of rows in the file when it was opened.
    """

    def __init__(self, path: pathlib.Path, facts: Mapping[str, Any]):
        """Reads the rows of a file that begins with `facts`, what they depend on besides images, or begins the file."""
        self._path, self._rows, head = path, {}, json.dumps(dict(facts))
        first, *lines = read_text(path, "partial results").split("\n") if path.is_file() else [""]
        if first != head:
            lines = []
            write_whole(path, f"{head}\n")
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # cut short
                stamp, row = json.loads(line)
                self._rows[row["filename"]] = stamp, row["metadata"], row
        self.found = len(self._rows)

    def row(self, path: pathlib.Path, metadata: Mapping) -> dict | None:
        """Returns the row of an image; None if there is none, or the image or its metadata have changed."""
        *made_of, row = self._rows.get(str(path), (None, None, None))
        return row if made_of == [_stamp(path), json.dumps(dict(metadata))] else None

    def add(self, path: pathlib.Path, row: Mapping) -> None:
        """Appends the row of an image."""
        append_line(self._path, json.dumps([_stamp(path), row]))

    def remove(self) -> None:
        """Removes the file."""
        self._path.unlink()


def _stamp(path: pathlib.Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def judge_entries(
    entries: Iterable[folder.Entry], detector: Detector, thresholds: Thresholds, partial: Partial | None = None
) -> Report:
    """Evaluates the entries of a folder; rows of `partial` are used, and others are added to it."""
    rows = []
    for entry in entries:
        for path in entry.images:
            row = partial and partial.row(path, entry.metadata)
            if row is None:
                row = judge_image(str(path), entry.metadata, np.asarray(load_image(path)), detector, thresholds)
                if partial is not None:
                    partial.add(path, row)
            rows.append(row)
    scores = [
        geneval.summarize((row["tag"], row["prompt"], row[rule]) for row in rows) for rule in ("correct", "strict")
    ]
    return Report(rows, *scores)
