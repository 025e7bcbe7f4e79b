"""Logs of a training run: one aligned line per log step, metrics.jsonl, TensorBoard events and trackers."""

import contextlib
import functools
import itertools
import json
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
from etils import epath

from mefn_jax.config import count_pairs
from mefn_jax.errors import TrainingError
from mefn_jax.runtime.console import format_duration, print0, tolerate_faults
from mefn_jax.runtime.storage import Mirror
from mefn_jax.training.trackers import close_trackers, start_trackers

COPY_SECONDS = 30.0  # between copies of the log to a remote workdir; evaluations and saves copy it too


class Clock:
    """Clock of the training steps, with the time spent waiting for data. Evaluations and saves do not count."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Starts both times from zero."""
        self._start, self.data_wait = time.perf_counter(), 0.0

    def add_data_wait(self, since: float) -> None:
        """Adds the time since `since`, a `time.perf_counter()`, to the time spent waiting for data."""
        self.data_wait += time.perf_counter() - since

    @property
    def elapsed(self) -> float:
        """Returns the seconds since the start."""
        return time.perf_counter() - self._start


class TensorBoard:
    """Writer of TensorBoard events into `folder`, which is optional: after the first fault, it prints one line and
    writes nothing more. The file is opened when something is written, so that the import does not delay the first
    step."""

    def __init__(self, folder: Path, step: int):
        self._open, self._writer = functools.partial(_open_events, folder, step), None

    def add_scalars(self, step: int, values: dict) -> None:
        """Writes a scalar for each value."""
        self._call(lambda writer: [writer.add_scalar(name, value, step) for name, value in values.items()])

    def add_image(self, step: int, name: str, pixels) -> None:
        """Writes an image, uint8 `(H, W, 3)`."""
        self._call(lambda writer: writer.add_image(name, pixels, step, dataformats="HWC"))

    def flush(self) -> None:
        """Writes what is pending."""
        if self._writer is not None:
            self._call(lambda writer: writer.flush())

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._call(lambda writer: writer.close())
        self._open = self._writer = None

    def _call(self, method) -> None:
        """Calls `method(writer)`. The first call opens the writer; after a fault, nothing is called."""
        make, self._open = self._open, None
        writer, self._writer = self._writer, None
        if make is None and writer is None:
            return
        with tolerate_faults("TensorBoard"):
            writer = writer or make()
            events = writer.file_writer.event_writer
            # If its thread has died of a full disk, tensorboardX waits for ever for room in its queue.
            if not events._worker.is_alive():
                events._event_queue.cancel_join_thread()
                raise OSError("its file cannot be written")
            method(writer)
            self._writer = writer


def _open_events(folder: Path, step: int):
    """Returns a writer of TensorBoard events into `folder`. Viewers drop earlier events of steps after `step`."""
    from tensorboardX import SummaryWriter  # imported only by the process that writes

    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


class MetricsWriter:
    """Writer of WORKDIR/metrics.jsonl, of TensorBoard events, and to the trackers of `log.to`, active on process 0
    alone. `flush` copies the files to a remote workdir.

    When a run resumes at `step`, lines of later steps, whose work was lost, are dropped. Trackers keep those lines, and
    do not get them twice (`training/trackers.py`).
    """

    def __init__(self, workdir, step: int, config=None):
        """Opens the files, and starts the trackers of the configuration, if one is given."""
        self._active = jax.process_index() == 0
        if not self._active:
            return
        self._mirror, self._path = Mirror(workdir), epath.Path(workdir) / "metrics.jsonl"
        path = self._mirror.local / self._path.name
        with self._writing():
            self._mirror.fetch(path.name)
            _drop_after(path, step)
            self._file = path.open("a", encoding="utf-8")
            self._mirror.copy()  # missing rights are reported before the first step
        self._board = TensorBoard(path.parent / "tensorboard", step)
        self._feeds = start_trackers(config, workdir) if config is not None else []

    def write(self, step: int, values: dict) -> None:
        """Writes one line `{"step": step, name: number, ...}`, a TensorBoard scalar for each value, and both to the
        trackers."""
        if not self._active:
            return
        with self._writing():
            self._file.write(json.dumps({"step": step} | values) + "\n")
            self._file.flush()
        self._board.add_scalars(step, values)
        for feed in self._feeds:
            feed.write(step, values)

    def write_images(self, step: int, name: str, images) -> None:
        """Writes TensorBoard images `name/0`, `name/1`, ...; `images` yields uint8 arrays `(H, W, 3)`."""
        if self._active:
            for k, pixels in enumerate(images):
                self._board.add_image(step, f"{name}/{k}", pixels)

    def flush(self, seconds: float = 0.0) -> None:
        """Copies the files to a remote workdir, unless the last copy is less than `seconds` old."""
        if self._active and self._mirror.due(seconds):
            self._board.flush()
            with self._writing():
                self._mirror.copy()

    def close(self) -> None:
        """Closes both files and copies them a last time, and then closes the trackers, which show the run as failed if
        an exception is under way."""
        if not self._active:
            return
        try:
            self._board.close()
            with self._writing():
                self._file.close()
                self._mirror.copy()
            self._mirror.close()
        finally:
            close_trackers(self._feeds, failed=sys.exception() is not None)

    @contextlib.contextmanager
    def _writing(self):
        """Turns an OSError in its body into a TrainingError that says what to do."""
        try:
            yield
        except OSError as e:
            raise TrainingError(
                f"{self._path}: cannot be written ({e}). Checkpoints are intact: free some space and run the same "
                "command to resume from the latest"
            ) from e


class StepLog:
    """Log of the steps' metrics. It keeps them on the device and writes a line every `log_every` steps, one step late,
    so that reading them never waits for the device."""

    def __init__(self, config, schedule, steps: int, ideal_seconds: float | None = None):
        """Creates the log. `ideal_seconds` is the duration of a step at the devices' peak arithmetic, for MFU
        (docs/method.md, Eq. 55); None if the peak is not known."""
        self.clock, self._ideal_seconds = Clock(), ideal_seconds
        self._every, self._pairs = config.train.log_every, count_pairs(config)
        self._schedule, self._steps = schedule, steps
        self._window, self._first, self._untimed = [], True, 0

    def add(self, completed: int, metrics: dict, captions) -> None:
        """Keeps a step's metrics (on the device) and its batch's captions; `completed` is the number of completed
        steps."""
        self._window.append((completed, metrics, captions))
        if self._first:  # compilation does not count as a step's time
            jax.block_until_ready(metrics)
            print0(f"first step, compilation included: {self.clock.elapsed:.1f} s")
            self.clock.reset()
            self._first, self._untimed = False, 1

    def write(self, writer: MetricsWriter, bar, flush: bool) -> None:
        """Checks the steps that can be read and, when a line is due (or with `flush`), logs them. Raises TrainingError
        for the first step whose loss or gradient norm is not finite."""
        ready = len(self._window) if flush else len(self._window) - 1
        if not flush and (ready < 1 or self._window[ready - 1][0] % self._every):
            return
        window, self._window = self._window[:ready], self._window[ready:]
        values = [(completed, jax.device_get(metrics), captions) for completed, metrics, captions in window]
        for completed, metrics, captions in values:
            if not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["grad_norm"]):
                raise TrainingError(
                    f"step {completed}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; captions of the "
                    f"batch (positions in the training split): {captions.tolist()}. Lower train.learning_rate, or "
                    "inspect these captions; the latest checkpoint precedes this step"
                )
        # The clock was reset after the first step, so that step is not timed. If it is the only one, the time since
        # then stands for it.
        seconds = self.clock.elapsed / max(1, len(values) - self._untimed)
        self._untimed = 0
        for _, line_values in itertools.groupby(values, key=lambda step_values: (step_values[0] - 1) // self._every):
            self._write_line(writer, bar, list(line_values), seconds)
        if not flush:  # otherwise the training loop flushes before it saves
            writer.flush(COPY_SECONDS)
        if values:
            self.clock.reset()

    def _write_line(self, writer: MetricsWriter, bar, values: list, seconds: float) -> None:
        """Writes one line for the values of several steps; `seconds` is the duration of one step."""
        completed, last_metrics, _ = values[-1]
        line = {
            "loss": float(np.mean([metrics["loss"] for _, metrics, _ in values])),
            "grad_norm": float(last_metrics["grad_norm"]),
            "learning_rate": float(self._schedule(completed - 1)),
            "ms_per_step": 1000 * seconds,
            "pairs_per_s": self._pairs / seconds,
            "data_wait": self.clock.data_wait / self.clock.elapsed,
        }
        mfu = ""
        if self._ideal_seconds is not None:
            line["mfu"] = self._ideal_seconds / seconds
            mfu = f"MFU {line['mfu']:4.1%}  "
        writer.write(completed, line)
        with bar.external_write_mode():
            print0(
                f"step {completed:>{len(str(self._steps))}}/{self._steps}  loss {line['loss']:8.4f}  "
                f"grad {line['grad_norm']:7.3f}  lr {line['learning_rate']:.2e}  {line['ms_per_step']:7.1f} ms/step  "
                f"{line['pairs_per_s']:7.0f} pairs/s  data {line['data_wait']:4.0%}  "
                f"{mfu}ETA {format_duration(seconds * (self._steps - completed))}"
            )


def _drop_after(path: Path, step: int) -> None:
    """Removes the lines of steps after `step`, and from the first damaged line on, from a metrics.jsonl."""
    if not path.is_file():
        return
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(text)["step"] <= step:
                lines.append(text + "\n")
        except ValueError:  # a killed run may leave half a line
            break
    replacement = path.with_suffix(".new")
    replacement.write_text("".join(lines), encoding="utf-8")
    os.replace(replacement, path)
