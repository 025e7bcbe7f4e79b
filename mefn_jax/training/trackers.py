"""Experiment trackers beside TensorBoard (`log.to`): the lines of metrics.jsonl in W&B, MLflow or trackio.

A tracker never stops or slows a training. Lines go into a bounded queue, from which a thread hands them to the client
(`training/tracker_clients.py`). What fails or does not fit is dropped, with one warning. At the end, the clients get
some seconds for what is pending.

A run that resumes goes on in the same run of the tracker, whose identifier is in WORKDIR/trackers.json. The file also
has the last step of each metric that was handed to the client, written before the client gets it: a run that resumes
from an older checkpoint repeats steps, and sends them only once. So no curve goes back; a kill may leave a gap.
"""

import contextlib
import importlib.util
import json
import numbers
import queue
import threading
import time

from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from mefn_jax.config import suggest
from mefn_jax.errors import ConfigError, reason
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.storage import absolute, is_remote, write_atomic
from mefn_jax.training.tracker_clients import FINISH_SECONDS, TRACKERS, Line, TrackedRun

RUNS_FILE = "trackers.json"  # file in the workdir: `{tracker: {"id": text, "steps": {metric: step}}}`
QUEUE_LINES = 1000  # that wait for a slow tracker; further ones are dropped
RETRY_SECONDS = 60.0  # after a run could not be begun
BATCH_SECONDS = 2.0  # between two looks at the queue: a bucket takes one write of an object in a second


def check_trackers(config: ConfigDict) -> list[str]:
    """Returns the names of the trackers in `log.to`, which are separated by commas. Raises ConfigError for a name that
    is none, and for a package that is not installed."""
    names = [name.strip() for name in config.log.to.split(",") if name.strip()]
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"log.to: {name!r} is not one of {', '.join(TRACKERS)}{suggest(name, TRACKERS)}")
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder `wandb`, which W&B writes, is no package
            raise ConfigError(f"log.to={config.log.to}: the package {name} is missing; pip install {name}")
    if len(set(names)) < len(names):
        raise ConfigError(f"log.to={config.log.to} names one twice; give each tracker once")
    if names and not config.log.project:
        raise ConfigError("log.project is empty; give a name, under which the trackers group the runs")
    return names


def start_trackers(config: ConfigDict, workdir) -> list["Feed"]:
    """Starts the trackers of `log.to`, without waiting for them. Call it on one process alone. Raises ConfigError as
    `check_trackers` does, and for a damaged WORKDIR/trackers.json."""
    names = check_trackers(config)
    if not names:
        return []
    workdir, record = absolute(workdir), Record(epath.Path(workdir) / RUNS_FILE)
    name = "/".join(str(workdir).rstrip("/").split("/")[-2:])
    run = TrackedRun(config.log.project, name, config.to_dict(), None if is_remote(workdir) else workdir)
    return [Feed(name, run, record) for name in names]


class Record:
    """WORKDIR/trackers.json: the identifier of the run in each tracker, and the last step of each metric there."""

    def __init__(self, path: epath.Path):
        self._path, self._lock = path, threading.Lock()
        try:
            self._runs = json.loads(path.read_text()) if path.exists() else {}
            for run in self._runs.values():
                _check_entry(run)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise ConfigError(f"{path}: damaged ({reason(e)}); remove it, and the trackers begin new runs") from None

    def read(self, tracker: str) -> tuple[str | None, dict[str, int]]:
        """Returns the identifier of the run, None if there is none yet, and the last step by metric."""
        run = self._runs.get(tracker, {"id": None, "steps": {}})
        return run["id"], dict(run["steps"])

    def write(self, tracker: str, run_id: str | None, steps: dict[str, int]) -> None:
        """Replaces both, on the disk or in the bucket. Raises OSError."""
        with self._lock:
            self._runs[tracker] = {"id": run_id, "steps": dict(steps)}
            write_atomic(self._path, json.dumps(self._runs, indent=1).encode())


def _check_entry(run: dict) -> None:
    """Raises ValueError, KeyError or AttributeError unless a value is an entry of the record."""
    steps_are_numbers = all(type(step) is int for step in run["steps"].values())
    if not steps_are_numbers or not isinstance(run["id"], str | None):
        raise ValueError("expected the id of a run, and steps by metric")


class Feed:
    """Queue of lines for one tracker, and the thread that empties it."""

    def __init__(self, tracker: str, run: TrackedRun, record: Record):
        self._tracker, self._run, self._record = tracker, run, record
        self._id, self._steps = record.read(tracker)
        self._queue, self._client, self._next_try = queue.SimpleQueue(), None, 0.0
        self._lines = self._lost = 0
        self._warned, self._closing, self._failed = False, threading.Event(), False
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"tracker {tracker}")
        self._thread.start()

    def write(self, step: int, values: dict) -> None:
        """Hands over a line, without waiting; drops it if too many wait."""
        self._lines += 1
        if self._queue.qsize() >= QUEUE_LINES:
            self._lose(1, f"{QUEUE_LINES} lines wait for it")
        else:
            self._queue.put(Line(step, dict(values)))

    def close(self, failed: bool) -> None:
        """Lets the thread send what is pending and end. `failed`: whether the training ends with an error."""
        self._failed = failed
        self._closing.set()

    def wait(self, deadline: float) -> None:
        """Waits for the end of the thread until `deadline` (`time.monotonic()`), and prints how many lines are lost."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._lose(0, f"it did not finish within {FINISH_SECONDS:.0f} s")
        if lost := self._lost + self._queue.qsize():
            print0(f"note: {self._tracker} did not get {lost} of {self._lines} lines; metrics.jsonl has them all")

    def _work(self) -> None:
        """Hands lines to the client until the feed is closed. The body of the thread."""
        closing = False
        while not closing:
            closing = self._closing.wait(BATCH_SECONDS)
            self._begin()
            if self._client is not None:  # until then, the lines wait
                self._send(self._take())
        if self._client is not None:
            with self._tolerating(0):
                self._client.finish(self._failed)

    def _take(self) -> list[Line]:
        """Returns the lines that wait."""
        lines = []
        with contextlib.suppress(queue.Empty):
            while True:
                lines.append(self._queue.get_nowait())
        return lines

    def _begin(self) -> None:
        """Begins the run, or goes on with it, unless that has succeeded or has just failed."""
        if self._client is not None or time.monotonic() < self._next_try:
            return
        self._next_try = time.monotonic() + RETRY_SECONDS
        kind = TRACKERS[self._tracker]
        with self._tolerating(0):
            if self._id is None and (proposed := kind.propose_id(self._run)):
                self._keep(proposed)  # before the service knows it: no process begins a second run
            client = kind(self._run, self._id)
            self._keep(client.id)
            self._client = client
            _print_above_bar(f"{self._tracker}: run {client.id} {client.place}".rstrip())

    def _keep(self, run_id: str) -> None:
        """Keeps the identifier of the run."""
        if run_id != self._id:
            self._record.write(self._tracker, run_id, self._steps)
            self._id = run_id

    def _send(self, lines: list[Line]) -> None:
        """Sends the numbers of lines, without those of steps that were sent before."""
        new = []
        for line in lines:
            values = {name: float(value) for name, value in line.values.items() if self._is_new(line.step, name, value)}
            self._steps |= dict.fromkeys(values, line.step)
            new += [Line(line.step, values)] if values else []
        if new:
            with self._tolerating(len(new)):
                self._record.write(self._tracker, self._id, self._steps)
                self._client.log(new)

    def _is_new(self, step: int, name: str, value) -> bool:
        """Returns whether a value is a number that the tracker has not got yet."""
        return isinstance(value, numbers.Real) and self._steps.get(name, -1) < step

    @contextlib.contextmanager
    def _tolerating(self, lines: int):
        """Counts the lines as lost if the body fails, and warns the first time."""
        try:
            yield
        except Exception as e:
            self._lose(lines, reason(e))

    def _lose(self, lines: int, cause: str) -> None:
        """Counts lines that are lost, and prints the cause of the first loss."""
        self._lost += lines
        if not self._warned:
            self._warned = True
            _print_above_bar(f"warning: {self._tracker} failed ({cause}); training goes on")


def close_trackers(feeds: list[Feed], failed: bool) -> None:
    """Closes feeds. They get FINISH_SECONDS together. `failed`: whether the training ends with an error."""
    deadline = time.monotonic() + FINISH_SECONDS
    for feed in feeds:
        feed.close(failed)
    for feed in feeds:
        feed.wait(deadline)


def _print_above_bar(text: str) -> None:
    """Prints a line from another thread than that of the progress bar."""
    with tqdm.external_write_mode():
        print0(text)
