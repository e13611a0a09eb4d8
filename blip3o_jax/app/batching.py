"""A bounded queue of jobs that are processed in batches.

Several batches run in parallel, each in a thread, so that new jobs can start while earlier ones are running. One thread
at a time gathers the next batch: the oldest job determines its kind, so that no kind starves, and further jobs of this
kind are added while they keep arriving.
"""

import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from blip3o_jax.errors import require

QUIET, PATIENCE = 0.01, 0.1  # seconds without a new job after which a batch starts, and the longest wait


class Full(Exception):
    """Raised when the queue has no room."""


class Closing(Exception):
    """Raised when no further jobs are accepted."""


class Dropped(Exception):
    """Raised when all jobs of a batch were dropped."""


@dataclasses.dataclass(eq=False)
class Job:
    """A request for one result; a caller that stops waiting for its answer calls `drop`."""

    kind: Hashable  # jobs of one kind may share a batch
    what: Any  # the request
    answer: concurrent.futures.Future = dataclasses.field(default_factory=concurrent.futures.Future)
    watched: bool = False  # whether `seen` is used
    seen: Any = None  # the progress so far
    dropped: bool = False

    def drop(self) -> None:
        """Remove the job from the queue; a running batch is aborted when all of its jobs were dropped."""
        self.dropped = True


class Batcher:
    """Run jobs in batches.

    Args:
      run: returns the results of the jobs of a batch, in order. If it raises, the jobs are run one by one, so that a
        failure affects no other job, and the exception is the result of a single job. It may raise Dropped.
      fits: (queued jobs of a kind, idle lanes) -> size of the next batch.
      room: most queued jobs.
      lanes: batches that run in parallel.

    Attributes:
      closing: whether further jobs are rejected.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Job]], Sequence[Any]],
        fits: Callable[[int, int], int],
        room: int,
        lanes: int = 1,
    ):
        self._run, self._fits, self._room = run, fits, room
        self._queue: list[Job] = []
        self._changed, self._gathering = threading.Condition(), threading.Lock()
        self._idle, self.closing = lanes, False
        self._threads = [threading.Thread(target=self._work, name="batches", daemon=True) for _ in range(lanes)]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Number of queued jobs."""
        return sum(not job.dropped for job in list(self._queue))

    @property
    def works(self) -> bool:
        """Whether all threads are running."""
        return all(thread.is_alive() for thread in self._threads)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all jobs or none.

        Raises:
          Full, Closing: none was queued.
          UserError: more jobs than the queue ever holds.
        """
        require(len(jobs) <= self._room, "n", len(jobs), f"at most {self._room}, the queue's length", "lower it")
        with self._changed:
            self._forget_dropped()
            if self.closing:
                raise Closing
            if len(self._queue) + len(jobs) > self._room:
                raise Full
            self._queue += jobs
            self._changed.notify_all()

    def close(self) -> None:
        """Reject further jobs; those in the queue are still processed."""
        with self._changed:
            self.closing = True
            self._changed.notify_all()

    def join(self, timeout: float | None = None) -> bool:
        """Wait after `close` until all jobs are processed; return whether they are."""
        for thread in self._threads:
            thread.join(timeout)
        return not any(thread.is_alive() for thread in self._threads)

    def rest(self, quiet: float, patience: float) -> None:
        """Wait until no job was queued or running for `quiet` seconds, at most `patience` seconds."""
        end = time.monotonic() + patience
        calm = time.monotonic() + quiet
        with self._changed:
            while not self.closing and (now := time.monotonic()) < min(end, calm):
                self._changed.wait(min(end, calm) - now)
                if self._queue or self._idle < len(self._threads):
                    calm = time.monotonic() + quiet

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            self._answer(batch)
            with self._changed:
                self._idle += 1

    def _next(self) -> list[Job] | None:
        """Gather the next batch; None when the queue is closed and empty."""
        with self._gathering, self._changed:
            while not self._queue and not self.closing:
                self._changed.wait()
                self._forget_dropped()
            start = time.monotonic()
            while not self.closing and self._queue and not self._full():
                came = self._changed.wait(QUIET)
                self._forget_dropped()
                if not came or time.monotonic() > start + PATIENCE:
                    break
            alike = self._alike()
            if not alike and self.closing:
                return None
            batch = alike[: self._fits(len(alike), self._idle)] if alike else []
            self._queue = [job for job in self._queue if job not in batch]
            self._idle -= 1
            return [job for job in batch if job.answer.set_running_or_notify_cancel()]

    def _full(self) -> bool:
        """Return whether the next batch has the largest size."""
        return self._fits(len(self._alike()), self._idle) == self._fits(self._room * self._idle, self._idle)

    def _alike(self) -> list[Job]:
        """List jobs of the oldest one's kind."""
        return [job for job in self._queue if job.kind == self._queue[0].kind]

    def _forget_dropped(self) -> None:
        self._queue = [job for job in self._queue if not job.dropped]

    def _answer(self, batch: Sequence[Job]) -> None:
        batch = [job for job in batch if not job.dropped]
        try:
            answers = self._run(batch) if batch else ()
        except Dropped:
            return
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(error)
            else:
                for job in batch:
                    self._answer([job])
            return
        for job, answer in zip(batch, answers, strict=True):
            job.answer.set_result(answer)
