"""One thread that computes all queries, in the order in which they came.

The model's programs use all cores or the whole accelerator, so queries side by side would be no faster, and would need
memory for each.
"""

import queue
import threading
from collections.abc import Callable

from mefn_jax.serving.limits import MAX_QUEUED


class BusyError(Exception):
    """Error because the queue of waiting queries is full."""


class CancelledError(Exception):
    """Error that ends a query whose client no longer waits."""


class Job:
    """A query in the queue.

    Attributes:
        started: is set once its turn has come.
        finished: is set once `result`, or the exception `error`, is known.
        progress: parts done, and all parts.
    """

    def __init__(self, compute: Callable):
        self._compute, self._cancelled = compute, threading.Event()
        self.started, self.finished = threading.Event(), threading.Event()
        self.progress, self.result, self.error = (0, 1), None, None

    def cancel(self) -> None:
        """Makes the query end at its next step, or before it begins."""
        self._cancelled.set()

    def report(self, done: int, total: int) -> None:
        """Notes the progress. A computation calls it between its steps. Raises CancelledError after `cancel`."""
        if self._cancelled.is_set():
            raise CancelledError
        self.progress = done, total

    def run(self) -> None:
        """Computes the result; an exception becomes `error`."""
        self.started.set()
        try:
            self.report(0, 1)
            self.result = self._compute(self.report)
        except BaseException as e:  # the thread must go on, whatever a query does
            self.error = e
        self._compute = None  # with the image that was sent
        self.finished.set()


class Worker:
    """The thread and its queue of at most `size` waiting jobs."""

    def __init__(self, size: int = MAX_QUEUED):
        self._queue = queue.Queue(size)
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Returns about how many jobs wait."""
        return self._queue.qsize()

    def submit(self, compute: Callable) -> Job:
        """Returns the job that will call `compute(report)`, in the order of the calls; `report` is `Job.report`. Raises
        BusyError if the queue is full."""
        job = Job(compute)
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            raise BusyError from None
        return job

    def close(self) -> None:
        """Ends the thread after the job that it computes; jobs that wait are cancelled."""
        while True:
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                break
            job.cancel()
            job.run()
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            job.run()
            del job  # keeps no image while it waits for the next one
