"""What a run says: the header, one aligned line a log step, metrics.jsonl and TensorBoard events."""

import contextlib
import json
import os
import time
from pathlib import Path

import jax

from mefn_jax.errors import TrainingError


def say(text: str) -> None:
    """Prints on process 0."""
    if jax.process_index() == 0:
        print(text, flush=True)


def header(rows: dict[str, str]) -> None:
    """One "name  value" line each, aligned."""
    width = max(map(len, rows))
    for name, value in rows.items():
        say(f"{name:<{width}}  {value}")


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Clock:
    """Time spent in steps, and the share of it spent waiting for data; evaluations and saves do not count."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self._start, self.data = time.perf_counter(), 0.0

    def waited(self, since: float) -> None:
        """Adds the time since `since` (a `time.perf_counter()`) as waiting for data."""
        self.data += time.perf_counter() - since

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._start


class Writer:
    """Appends to WORKDIR/metrics.jsonl and writes TensorBoard events, on process 0.

    On resuming at `step`, lines of later steps (of work that was lost) are dropped.
    """

    def __init__(self, workdir, step: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        from tensorboardX import SummaryWriter  # only the process that writes needs it

        self._path = Path(workdir) / "metrics.jsonl"
        with self._writing():
            _drop_after(self._path, step)
            self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, values: dict) -> None:
        """One line `{"step": step, name: number, ...}`, and a TensorBoard scalar each."""
        if not self._active:
            return
        with self._writing():
            self._file.write(json.dumps({"step": step} | values) + "\n")
            self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._active:
            self._board.close()
            with self._writing():
                self._file.close()

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as e:
            raise TrainingError(
                f"{self._path}: cannot be written ({e}). Checkpoints are intact: free some space and run the same "
                "command to go on from the latest"
            ) from e


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
