"""What a training run says: the header, one aligned line a log step, metrics.jsonl and TensorBoard events."""

import contextlib
import itertools
import json
import os
import time
from pathlib import Path

import jax
import numpy as np
from etils import epath

from mefn_jax.errors import TrainingError
from mefn_jax.runtime.console import format_duration, print0
from mefn_jax.runtime.storage import Mirror

COPY_SECONDS = 30.0  # between two copies of the log to a remote workdir, beside those at evaluations and saves


class Clock:
    """Time spent in steps, and the share of it spent waiting for data; evaluations and saves do not count."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Starts anew."""
        self._start, self.data = time.perf_counter(), 0.0

    def add_data_wait(self, since: float) -> None:
        """Adds the time since `since` (a `time.perf_counter()`) as waiting for data."""
        self.data += time.perf_counter() - since

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start


class MetricsWriter:
    """Appends to WORKDIR/metrics.jsonl and writes TensorBoard events, on process 0; `flush` copies them to a remote
    workdir.

    On resuming at `step`, lines of later steps (of work that was lost) are dropped.
    """

    def __init__(self, workdir, step: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        from tensorboardX import SummaryWriter  # only the process that writes needs it

        self._mirror, self._path = Mirror(workdir), epath.Path(workdir) / "metrics.jsonl"
        path = self._mirror.local / self._path.name
        with self._writing():
            self._mirror.fetch(path.name)
            _drop_after(path, step)
            self._file = path.open("a", encoding="utf-8")
            self._mirror.copy()  # rights that lack are said before the first step
        self._board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, values: dict) -> None:
        """One line `{"step": step, name: number, ...}`, and a TensorBoard scalar each."""
        if not self._active:
            return
        with self._writing():
            self._file.write(json.dumps({"step": step} | values) + "\n")
            self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def write_images(self, step: int, name: str, images) -> None:
        """Writes TensorBoard images `name/0`, `name/1`, ...; `images` yields uint8 arrays `(H, W, 3)`."""
        if self._active:
            for k, pixels in enumerate(images):
                self._board.add_image(f"{name}/{k}", pixels, step, dataformats="HWC")

    def flush(self, seconds: float = 0.0) -> None:
        """Copies what has been written to a remote workdir, unless that was done less than `seconds` ago."""
        if self._active and self._mirror.due(seconds):
            self._board.flush()
            with self._writing():
                self._mirror.copy()

    def close(self) -> None:
        """Closes both files."""
        if self._active:
            self._board.close()
            with self._writing():
                self._file.close()
                self._mirror.copy()
            self._mirror.close()

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as e:
            raise TrainingError(
                f"{self._path}: cannot be written ({e}). Checkpoints are intact: free some space and run the same "
                "command to go on from the latest"
            ) from e


class StepLog:
    """Collects each step's metrics on the device and writes a line every `log_every` steps, one step late."""

    def __init__(self, config, schedule, steps: int, peak_seconds: float | None = None):
        """`peak_seconds` is what a step would take at the devices' peak, None where that is not known."""
        self.clock, self._peak_seconds = Clock(), peak_seconds
        self._every, self._batch = config.train.log_every, config.train.batch_size
        self._schedule, self._steps = schedule, steps
        self._window, self._first, self._untimed = [], True, 0

    def add(self, done: int, metrics: dict, captions) -> None:
        """Metrics on the device of the step after which `done` are done, and its batch's captions."""
        self._window.append((done, metrics, captions))
        if self._first:  # compilation is no part of a step's time
            jax.block_until_ready(metrics)
            print0(f"first step, compilation included: {self.clock.elapsed:.1f} s")
            self.clock.reset()
            self._first, self._untimed = False, 1

    def write(self, writer: MetricsWriter, bar, flush: bool) -> None:
        """Checks and logs what is due. Raises TrainingError at the first step whose loss is not finite."""
        due = len(self._window) if flush else len(self._window) - 1
        if not flush and (due < 1 or self._window[due - 1][0] % self._every):
            return
        window, self._window = self._window[:due], self._window[due:]
        values = [(done, jax.device_get(m), captions) for done, m, captions in window]
        for done, m, captions in values:
            if not np.isfinite(m["loss"]) or not np.isfinite(m["grad_norm"]):
                raise TrainingError(
                    f"step {done}: loss {m['loss']}, gradient norm {m['grad_norm']}; captions of the batch (positions "
                    f"in the training split): {captions.tolist()}. Lower train.learning_rate, or look at these; the "
                    "latest checkpoint is from before"
                )
        # The first step took no time on this clock; alone, it has what has gone by since.
        seconds = self.clock.elapsed / max(1, len(values) - self._untimed)
        self._untimed = 0
        for _, line in itertools.groupby(values, key=lambda v: (v[0] - 1) // self._every):
            self._line(writer, bar, list(line), seconds)
        if not flush:  # else the training loop flushes, beside the save
            writer.flush(COPY_SECONDS)
        if values:
            self.clock.reset()

    def _line(self, writer: MetricsWriter, bar, values: list, seconds: float) -> None:
        """One line for some steps' values; `seconds` is what a step took."""
        done, m, _ = values[-1]
        line = {
            "loss": float(np.mean([v["loss"] for _, v, _ in values])),
            "grad_norm": float(m["grad_norm"]),
            "learning_rate": float(self._schedule(done - 1)),
            "ms_per_step": 1000 * seconds,
            "pairs_per_s": self._batch / seconds,
            "data_wait": self.clock.data / self.clock.elapsed,
        }
        mfu = ""
        if self._peak_seconds is not None:
            line["mfu"] = self._peak_seconds / seconds
            mfu = f"MFU {line['mfu']:4.1%}  "
        writer.write(done, line)
        with bar.external_write_mode():
            print0(
                f"step {done:>{len(str(self._steps))}}/{self._steps}  loss {line['loss']:8.4f}  "
                f"grad {line['grad_norm']:7.3f}  lr {line['learning_rate']:.2e}  {line['ms_per_step']:7.1f} ms/step  "
                f"{line['pairs_per_s']:7.0f} pairs/s  data {line['data_wait']:4.0%}  "
                f"{mfu}ETA {format_duration(seconds * (self._steps - done))}"
            )


def _drop_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:  # a killed run may have left half a line
            break
    new = path.with_suffix(".new")
    new.write_text("".join(kept), encoding="utf-8")
    os.replace(new, path)
