"""Waiting for queries: progress in lines, errors after it, and clients that go away. Without a model."""

import json
import threading
import time

import pytest

from mefn_jax.errors import DataError, TrainingError
from mefn_jax.serving import limits, queries
from mefn_jax.serving.messages import ClientGoneError, PageRequest, RequestError
from mefn_jax.serving.queries import run_query
from mefn_jax.serving.worker import CancelledError, Worker


@pytest.fixture
def worker(monkeypatch):
    monkeypatch.setattr(queries, "STREAM_SECONDS", 0.05)
    monkeypatch.setattr(queries, "LOOK_SECONDS", 0.005)
    started = Worker(size=2)
    yield started
    started.close()


def make_request(is_gone=lambda: False) -> PageRequest:
    return PageRequest("POST", "/api/search", {}, b"", "application/json", is_gone)


def read_lines(response) -> list[dict]:
    body = response.body if isinstance(response.body, bytes) else b"".join(response.body)
    return [json.loads(line) for line in body.splitlines()]


def test_quick_query_is_one_line(worker):
    response = run_query(worker, lambda report: {"results": []}, make_request(), pytest.fail)
    assert isinstance(response.body, bytes)
    assert read_lines(response) == [{"results": []}]


def test_slow_query_tells_its_place_and_its_progress(worker):
    first = threading.Event()
    worker.submit(lambda report: first.wait(10))
    gates = [threading.Event() for _ in range(3)]

    def compute(report):
        for k, gate in enumerate(gates):
            report(k, 3)
            gate.wait(10)
        return {"results": [1]}

    lines = iter(run_query(worker, compute, make_request(), pytest.fail).body)
    assert json.loads(next(lines)) == {"waiting": 1}
    first.set()
    seen = []
    for gate in gates:
        seen.append(json.loads(next(lines)))
        gate.set()
        time.sleep(0.03)
    seen += [json.loads(line) for line in lines]
    assert seen[0]["of"] in (1, 3)
    assert {"done": 2, "of": 3} in seen
    assert seen[-1] == {"results": [1]}


def test_client_that_goes_away_ends_its_query_before_and_after_the_first_line(worker):
    for wait in (0.0, 0.1):
        start, ended = time.monotonic(), threading.Event()

        def compute(report, ended=ended):
            try:
                while True:
                    report(0, 1)
                    time.sleep(0.002)
            except CancelledError:
                ended.set()
                raise

        gone = make_request(lambda start=start, wait=wait: time.monotonic() - start > wait)
        with pytest.raises(ClientGoneError):
            list(run_query(worker, compute, gone, pytest.fail).body)
        assert ended.wait(5)


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (DataError("image 'x' cannot be decoded"), 400, "image 'x' cannot be decoded"),
        (TrainingError("its score is not finite"), 500, "internal error"),
        (KeyError("surprise"), 500, "internal error"),
    ],
)
def test_error_has_its_status_or_is_the_last_line(error, status, message, worker):
    def fail(report, seconds=0.0):
        time.sleep(seconds)
        raise error

    with pytest.raises(RequestError, match=message) as refused:
        run_query(worker, fail, make_request(), pytest.fail)
    assert refused.value.status == status
    notes = []
    lines = read_lines(run_query(worker, lambda report: fail(report, 0.15), make_request(), notes.append))
    assert message in lines[-1]["error"]
    assert [note.split()[0] for note in notes] == [str(status)]


def test_query_that_takes_too_long_is_ended(worker, monkeypatch):
    monkeypatch.setattr(limits, "QUERY_SECONDS", 0.1)

    def compute(report):
        while True:
            report(0, 1)
            time.sleep(0.002)

    lines = read_lines(run_query(worker, compute, make_request(), lambda note: None))
    assert lines[-1] == {"error": "the query took too long and was ended"}


def test_full_queue_is_refused(worker):
    go = threading.Event()
    running = worker.submit(lambda report: go.wait(10))
    running.started.wait(5)
    for _ in range(2):
        worker.submit(lambda report: None)
    with pytest.raises(RequestError, match="too many queries wait") as refused:
        run_query(worker, lambda report: None, make_request(), pytest.fail)
    assert refused.value.status == 503
    go.set()
