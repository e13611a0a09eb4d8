"""The queue: which jobs share a batch, what a failure or a client that leaves does, and how it ends."""

import threading
import time

import pytest

from blip3o_jax.app.batching import Batcher, Closing, Dropped, Full, Job

LIMIT = 20  # seconds for what takes milliseconds


class Model:
    """Answers with the batch that a job was in; stops while `gate` is closed."""

    def __init__(self):
        self.gate, self.entered, self.batches = threading.Event(), threading.Semaphore(0), []
        self.gate.set()

    def __call__(self, jobs):
        self.batches.append([job.what for job in jobs])
        self.entered.release()
        assert self.gate.wait(LIMIT)
        if any(job.what == "bad" for job in jobs):
            raise ValueError("bad")
        if all(job.dropped for job in jobs):
            raise Dropped
        return [(job.what, len(jobs)) for job in jobs]


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def batcher(model):
    yield from started(model, lanes=1)


@pytest.fixture
def two_lanes(model):
    yield from started(model, lanes=2)


def started(model, lanes):
    batcher = Batcher(model, fits=lambda waiting, idle: min(waiting, 4), room=8, lanes=lanes)
    yield batcher
    model.gate.set()
    batcher.close()
    assert batcher.join(LIMIT)


@pytest.fixture
def busy(model, batcher):
    """The model is at work on a job of another kind until its gate opens."""
    model.gate.clear()
    job = Job("other", "first")
    batcher.submit([job])
    assert model.entered.acquire(timeout=LIMIT)
    return job


def answers(jobs):
    return [job.answer.result(LIMIT) for job in jobs]


def test_jobs_of_a_kind_share_batches_and_the_oldest_job_comes_first(model, batcher, busy):
    jobs = [Job(kind, f"{kind}{i}") for i, kind in enumerate("abaaaba")]
    batcher.submit(jobs)
    assert batcher.waiting == 7
    model.gate.set()
    answers(jobs)
    assert model.batches == [["first"], ["a0", "a2", "a3", "a4"], ["b1", "b5"], ["a6"]]


def test_a_job_starts_while_a_batch_runs(model, two_lanes):
    model.gate.clear()
    for number in range(2):
        two_lanes.submit([Job("a", number)])
        assert model.entered.acquire(timeout=LIMIT)
    assert model.batches == [[0], [1]]
    two_lanes.submit([Job("a", 2)])
    assert not model.entered.acquire(timeout=0.3) and two_lanes.waiting == 1


@pytest.mark.parametrize("lanes", ["batcher", "two_lanes"])
def test_a_rare_kind_does_not_starve(model, lanes, request):
    batcher = request.getfixturevalue(lanes)
    common, stop = [Job("a", i) for i in range(6)], threading.Event()
    batcher.submit(common)

    def again(answer):
        if not stop.is_set():
            job = Job("a", "more")
            job.answer.add_done_callback(again)
            batcher.submit([job])

    for job in common:
        job.answer.add_done_callback(again)  # the queue is never without a job of the common kind
    rare = Job("b", "rare")
    batcher.submit([rare])
    answers([rare])
    stop.set()
    assert model.batches.index(["rare"]) <= 3


def test_idle_lanes_share_what_waits(model):
    for batcher in started(model, lanes=2):
        batcher._fits = lambda waiting, idle: min(-(-waiting // idle), 4)
        jobs = [Job("a", i) for i in range(6)]
        model.gate.clear()
        batcher.submit(jobs)
        assert all(model.entered.acquire(timeout=LIMIT) for _ in range(2))
        assert model.batches == [[0, 1, 2], [3, 4, 5]]


def test_jobs_that_come_together_share_a_batch_although_nothing_runs(model, batcher):
    jobs = [Job("a", i) for i in range(4)]
    for job in jobs:
        batcher.submit([job])
    assert [size for _, size in answers(jobs)] == [4] * 4


def test_one_that_fails_does_not_spoil_the_others_of_its_batch(model, batcher, busy):
    jobs = [Job("a", what) for what in ("good", "bad", "fine")]
    batcher.submit(jobs)
    model.gate.set()
    assert answers(jobs[::2]) == [("good", 1), ("fine", 1)]
    with pytest.raises(ValueError, match="bad"):
        jobs[1].answer.result(LIMIT)
    after = Job("a", "after")
    batcher.submit([after])
    assert answers([after]) == [("after", 1)]


def test_a_full_queue_takes_all_jobs_of_a_request_or_none(batcher, busy):
    batcher.submit([Job("a", i) for i in range(6)])
    with pytest.raises(Full):
        batcher.submit([Job("a", i) for i in range(3)])
    assert batcher.waiting == 6
    batcher.submit([Job("a", i) for i in range(2)])


def test_a_dropped_job_frees_its_place_and_is_not_run(model, batcher, busy):
    jobs = [Job("a", i) for i in range(8)]
    batcher.submit(jobs)
    for job in jobs[:7]:
        job.drop()
    assert batcher.waiting == 1
    late = [Job("a", "late") for _ in range(3)]
    batcher.submit(late)
    model.gate.set()
    assert answers([jobs[7], *late]) == [(7, 4), *[("late", 4)] * 3]
    assert model.batches == [["first"], [7, "late", "late", "late"]]


def test_a_batch_that_nobody_waits_for_ends(model, batcher, busy):
    busy.drop()
    model.gate.set()
    after = Job("a", "after")
    batcher.submit([after])
    assert answers([after]) == [("after", 1)]
    assert not busy.answer.done()


def test_an_answer_that_is_cancelled_at_any_time_stops_nothing(model, batcher, busy):
    """asyncio cancels the futures that a cancelled task waits for."""
    jobs = [Job("a", i) for i in range(3)]
    batcher.submit(jobs)
    assert not busy.answer.cancel() and jobs[1].answer.cancel()
    model.gate.set()
    assert answers([busy, *jobs[::2]]) == [("first", 1), (0, 2), (2, 2)]
    assert batcher.works


def test_rest_waits_for_jobs_but_not_for_ever(model, batcher, busy):
    begin = time.monotonic()
    batcher.rest(quiet=0.05, patience=0.3)
    assert time.monotonic() >= begin + 0.3
    model.gate.set()
    answers([busy])
    batcher.rest(quiet=0.05, patience=LIMIT)
    assert time.monotonic() < begin + LIMIT / 2


def test_after_close_what_waits_is_answered_and_nothing_is_taken(model, batcher, busy):
    jobs = [Job(kind, kind) for kind in "abc"]
    batcher.submit(jobs)
    batcher.close()
    assert batcher.closing and not batcher.join(0)
    with pytest.raises(Closing):
        batcher.submit([Job("a", "late")])
    model.gate.set()
    assert answers([busy, *jobs]) == [("first", 1), ("a", 1), ("b", 1), ("c", 1)]
    assert batcher.join(LIMIT)
