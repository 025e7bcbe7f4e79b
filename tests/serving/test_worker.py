"""The thread that computes queries: their order, its bound, and the end of queries that nobody waits for."""

import threading

import pytest

from mefn_jax.serving.worker import BusyError, CancelledError, Worker


@pytest.fixture
def worker():
    started = Worker(size=4)
    yield started
    started.close()
    assert not started._thread.is_alive()


def test_jobs_are_computed_in_the_order_in_which_they_came(worker):
    order, go = [], threading.Event()
    first = worker.submit(lambda report: go.wait(10))
    first.started.wait(10)
    jobs = [worker.submit(lambda report, k=k: order.append(k)) for k in range(4)]
    assert worker.waiting == 4
    with pytest.raises(BusyError):
        worker.submit(lambda report: None)
    go.set()
    for job in jobs:
        assert job.finished.wait(10)
    assert order == [0, 1, 2, 3]


def test_cancelled_job_ends_at_its_next_step_or_never_begins(worker):
    steps, at_step, go = [], threading.Event(), threading.Event()

    def compute(report):
        for k in range(100):
            report(k, 100)
            steps.append(k)
            at_step.set()
            go.wait(10)

    running = worker.submit(compute)
    waiting = worker.submit(lambda report: steps.append("never"))
    at_step.wait(10)
    assert running.progress == (0, 100)
    running.cancel()
    waiting.cancel()
    go.set()
    for job in (running, waiting):
        assert job.finished.wait(10)
        assert isinstance(job.error, CancelledError)
    assert steps == [0]


def test_job_that_fails_does_not_end_the_thread(worker):
    def fail(report):
        raise SystemExit("no")

    failed = worker.submit(fail)
    assert failed.finished.wait(10)
    assert isinstance(failed.error, SystemExit)
    following = worker.submit(lambda report: 7)
    assert following.finished.wait(10)
    assert following.result == 7


def test_close_cancels_what_waits():
    worker, go = Worker(), threading.Event()
    running = worker.submit(lambda report: go.wait(10))
    running.started.wait(10)
    waiting = worker.submit(lambda report: 1)
    closing = threading.Thread(target=worker.close)
    closing.start()
    assert waiting.finished.wait(10)
    assert isinstance(waiting.error, CancelledError)
    go.set()
    closing.join(10)
    assert not closing.is_alive()
