"""Writers of records: standard output, metrics.jsonl, TensorBoard and, optionally, Weights & Biases."""

import json
import math
import pathlib
import time
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
    """Writes an event file; on resumption, events after `last_step` are purged.

    Writes in the calling thread. The thread of tensorboardX's own `SummaryWriter` prints a traceback on a full disk.
    """

    def __init__(self, directory: pathlib.Path, last_step: int):
        # imported here because it takes a while
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        directory.mkdir(parents=True, exist_ok=True)
        self._summary, self._event = summary, Event
        self._file = EventsWriter(str(directory / "events"))
        self._add(last_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if name != "step" and value is not None:
                self._add(record["step"], summary=self._summary.scalar(name, value))
        self._file.flush()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._add(step, summary=self._summary.image(name, image, dataformats="HWC"))

    def close(self) -> None:
        self._file.close()

    def _add(self, step: int, **content: Any) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, **content))


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
