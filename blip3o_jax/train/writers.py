"""Writers of records: standard output, metrics.jsonl, TensorBoard and, optionally, Weights & Biases."""

import contextlib
import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from blip3o_jax.errors import UserError
from blip3o_jax.files import write_whole

Record = dict[str, float | int | None]


class Writer:
    """Base class of writers, which have a method `write(record)`."""

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Ignores an image uint8[Y X 3]."""

    def close(self) -> None:
        """Does nothing."""


class JsonLines(Writer):
    """Appends records to `metrics.jsonl`, one JSON object per line.

    Args:
      last_step: step to resume from: later records and incomplete lines are removed.
    """

    def __init__(self, path: pathlib.Path, last_step: int):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and _step(line) <= last_step]
        if kept != lines:
            write_whole(path, "".join(kept))
        self._file = open(path, "a")

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard(Writer):
    """Writes event files; on resumption, events after `last_step` are purged."""

    def __init__(self, directory: pathlib.Path, last_step: int):
        import tensorboardX  # imported here because it takes a while

        self._writer = tensorboardX.SummaryWriter(str(directory), purge_step=last_step + 1)

    def write(self, record: Record) -> None:
        with self._failing_once():
            for name, value in record.items():
                if name != "step" and value is not None:
                    self._writer.add_scalar(name, value, record["step"])
            self._writer.flush()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        with self._failing_once():
            self._writer.close()

    @contextlib.contextmanager
    def _failing_once(self) -> Iterator[None]:
        """Stops tensorboardX at an error, such as a full disk: its thread and its exit handler would fail again."""
        try:
            yield
        except OSError:
            events = self._writer.file_writer.event_writer
            if not events._closed:
                events._worker.stop()
                events._closed = True
            raise


class WeightsAndBiases(Writer):
    """Logs to one run on wandb.ai per working directory."""

    def __init__(self, directory: pathlib.Path, project: str, settings: dict[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise UserError("loop.wandb_project: no wandb", expected="the package", do="pip install wandb") from error
        self._image = wandb.Image
        self._run = wandb.init(
            project=project, dir=str(directory), id=_run_id(directory), resume="allow", config=settings
        )

    def write(self, record: Record) -> None:
        values = {name: value for name, value in record.items() if name != "step" and value is not None}
        self._run.log(values, step=record["step"])

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._run.log({name: self._image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


class Console(Writer):
    """Prints one line per record, without missing values and counts of 0."""

    def __init__(self, num_steps: int):
        self._num_steps = num_steps

    def write(self, record: Record) -> None:
        shown = {name: value for name, value in record.items() if value is not None and name != "step"}
        parts = [f"{name} {_short(value)}" for name, value in shown.items() if not isinstance(value, int) or value]
        print(f"step {record['step']}/{self._num_steps}  " + "  ".join(parts), flush=True)


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # not a record


def _short(value: float | int) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def _run_id(directory: pathlib.Path) -> str:
    path = directory / "wandb_id"
    if not path.exists():
        write_whole(path, np.random.default_rng().bytes(8).hex())
    return path.read_text()
