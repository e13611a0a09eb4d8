"""One side of a comparison in a process of its own: it runs a row when it is told to and says what that took.

A row has a `prepare` step that is not timed, so that a run may consume its input, and a `run` step that ends when the
result is there.
"""

import dataclasses
import gc
import multiprocessing
import pathlib
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
    """Something to be timed.

    Attributes:
      run: the timed part; it waits for its result.
      prepare: makes the argument of `run`.
      value: result -> array that both sides should agree on; None where they draw random numbers.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    value: Callable[[Any], np.ndarray] | None = None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Of one run of a row."""

    seconds: float
    peak_bytes: (
        int  # resident memory of the process while the row ran, weights included; of the device where it has one
    )
    value: np.ndarray | None


class Side:
    """A process that holds a model and runs rows of it."""

    def __init__(self, make: Callable[..., dict[str, Row]], *arguments: Any):
        """Starts it and waits until it is ready; `make(*arguments)` gives the rows, over there."""
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, make, *arguments), daemon=True)
        self._process.start()
        other.close()
        self.names, self.device = self._answer()

    def measure(self, name: str) -> Measurement:
        """Runs a row once."""
        self._pipe.send(name)
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._pipe.send(None)
        self._process.join()

    def _answer(self) -> Any:
        kind, answer = self._pipe.recv()
        if kind == "error":
            raise RuntimeError(f"a side failed:\n{answer}")
        return answer


def _serve(pipe, make, *arguments) -> None:
    try:
        rows, device, device_peak = make(*arguments)
        pipe.send(("ready", (list(rows), device)))
        while (name := pipe.recv()) is not None:
            pipe.send(("measured", _measure(rows[name], device_peak)))
    except Exception:
        pipe.send(("error", traceback.format_exc()))


def _measure(row: Row, device_peak: Callable[[], int] | None) -> Measurement:
    argument = row.prepare()
    gc.collect()
    _reset_peak()
    begin = time.perf_counter()
    result = row.run(argument)
    seconds = time.perf_counter() - begin
    peak = device_peak() if device_peak else _peak()
    return Measurement(seconds, peak, None if row.value is None else np.asarray(row.value(result), np.float32))


def _reset_peak() -> None:
    """Makes Linux count the peak of this process' resident memory anew."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
