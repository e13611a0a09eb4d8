"""A bounded queue in front of something that answers many jobs at once, one batch after the other.

One thread runs the batches. The oldest job chooses what kind comes next; jobs of that kind join it, and the batch waits
as long as more of them keep coming.
"""

import concurrent.futures
import dataclasses
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

QUIET, PATIENCE = 0.01, 0.1  # seconds without a further job after which a batch starts, and the most that it waits


class Full(Exception):
    """The queue has no room."""


class Closing(Exception):
    """No further jobs are taken."""


class Dropped(Exception):
    """Nobody waits for the batch any more."""


@dataclasses.dataclass(eq=False)
class Job:
    """Something to be answered.

    Attributes:
      kind: jobs of one kind may share a batch.
      what: is asked.
      answer: of the job; whoever waits for it calls `drop` when they give up.
      watched: whether anybody looks at `seen`.
      seen: what there is of the answer so far.
    """

    kind: Hashable
    what: Any
    answer: concurrent.futures.Future = dataclasses.field(default_factory=concurrent.futures.Future)
    watched: bool = False
    seen: Any = None
    dropped: bool = False

    def drop(self) -> None:
        """Frees the job's place in the queue; a batch ends early when all of its jobs were dropped."""
        self.dropped = True


class Batcher:
    """Runs jobs in batches, in a thread of its own.

    Args:
      run: answers of the jobs of a batch, in order. What it raises is the answer of a job that is alone; the jobs of a
        larger batch are then run one by one, so that none spoils another's answer. It may raise Dropped.
      largest: jobs of a batch.
      room: jobs that may wait.
    """

    def __init__(self, run: Callable[[Sequence[Job]], Sequence[Any]], largest: int, room: int):
        self._run, self._largest, self._room = run, largest, room
        self._queue: list[Job] = []
        self._changed = threading.Condition()
        self._running, self._closing = 0, False
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return sum(not job.dropped for job in list(self._queue))

    @property
    def works(self) -> bool:
        """Whether jobs are answered."""
        return self._thread.is_alive()

    @property
    def closing(self) -> bool:
        """Whether further jobs are refused."""
        return self._closing

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues all jobs or none.

        Raises:
          Full, Closing: see there.
        """
        with self._changed:
            self._forget_dropped()
            if self._closing:
                raise Closing
            if len(self._queue) + len(jobs) > self._room:
                raise Full
            self._queue += jobs
            self._changed.notify_all()

    def close(self) -> None:
        """Refuses further jobs; those in the queue are still answered."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def join(self, timeout: float | None = None) -> bool:
        """Waits after `close` until everything is answered; whether that is so."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            self._answer(batch)

    def _next(self) -> list[Job] | None:
        """The next batch; None when the last job is answered and the queue is closed."""
        with self._changed:
            while not self._queue and not self._closing:
                self._changed.wait()
                self._forget_dropped()
            start = time.monotonic()
            while 0 < len(batch := self._alike()) < self._largest and not self._closing:
                came = self._changed.wait(QUIET)
                self._forget_dropped()
                if not came or time.monotonic() > start + PATIENCE:
                    batch = self._alike()
                    break
            if not batch and self._closing:
                return None
            self._queue = [job for job in self._queue if job not in batch]
            return [job for job in batch if job.answer.set_running_or_notify_cancel()]

    def _alike(self) -> list[Job]:
        """Jobs of the oldest one's kind, as many as fit into a batch."""
        return [job for job in self._queue if job.kind == self._queue[0].kind][: self._largest]

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
