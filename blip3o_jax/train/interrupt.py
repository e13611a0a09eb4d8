"""Graceful interruption: SIGTERM and Ctrl-C set a flag that the loop checks after every step."""

import os
import signal
import sys
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Interruption:
    """Context manager that records SIGTERM and Ctrl-C.

    With several processes, JAX's preemption service handles SIGTERM, and all processes stop after the same step.
    """

    def __enter__(self) -> "Interruption":
        self._requested = False
        self._distributed = jax.process_count() > 1
        signals = [signal.SIGINT] if self._distributed else [signal.SIGINT, signal.SIGTERM]
        self._previous = {number: signal.signal(number, self._note) for number in signals}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Returns whether to save and stop after `step`; must be called at every step."""
        if self._distributed:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._requested = True
        print("\nstopping after a checkpoint; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._distributed and number == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGTERM)
