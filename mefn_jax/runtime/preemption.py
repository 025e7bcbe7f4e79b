"""Preemption: a signal announces that the run has to end. All processes then save at the same step and end."""

import contextlib
import io
import os
import signal
import sys
import threading
import time

import jax
from jax.experimental import multihost_utils

# A machine that is taken away, Ctrl-C, and a terminal that is closed.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# A terminal and a scheduler signal a whole group of processes, and some starters pass the signal on: that is one.
ECHO_SECONDS = 0.3


class Preemption:
    """Listener for `SIGNALS`, without those that the process was started to ignore (nohup). The first one makes
    `should_stop` true, the second one ends the process at once. Lost output (a closed terminal or pipe) counts as the
    first. Use it as a context manager in the main thread."""

    def __enter__(self):
        self._received, self._time, self._single = "", 0.0, jax.process_count() == 1
        # With several processes, JAX's own service listens for SIGTERM and chooses the step.
        signals = SIGNALS if self._single else SIGNALS[1:]
        signals = [number for number in signals if signal.getsignal(number) != signal.SIG_IGN]
        # A handler in Python would wait for the end of a compilation. This thread does not.
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_handlers = {number: signal.getsignal(number) for number in signals}
        self._thread = threading.Thread(target=self._listen, args=[reader], daemon=True)
        self._thread.start()
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in signals:
            signal.signal(number, lambda *_: None)
        self._stdout, sys.stdout = sys.stdout, _Output(sys.stdout, self._on_lost_output)
        return self

    def __exit__(self, *_):
        sys.stdout = self._stdout
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._writer)
        self._thread.join()

    def _listen(self, reader: int) -> None:
        """Reads the numbers of signals until the other end of the pipe is closed."""
        with open(reader, "rb", buffering=0) as pipe:
            while number := pipe.read(1):
                self._on_signal(number[0])

    def _on_signal(self, number: int) -> None:
        if number not in self._previous_handlers:
            return
        name, now = signal.Signals(number).name, time.monotonic()
        if self._received and now - self._time < ECHO_SECONDS:
            return
        if self._received:
            _say(f"{name}: ended without a further save; run the same command to resume")
            os._exit(128 + number)
        self._received, self._time = name, now
        _say(f"{name}: saving after this step; once more ends the run at once")
        if not self._single:
            os.kill(os.getpid(), signal.SIGTERM)  # to JAX's service

    def _on_lost_output(self) -> None:
        if not self._received:
            os.kill(os.getpid(), signal.SIGHUP)

    @property
    def cause(self) -> str:
        """Returns the name of the signal, SIGTERM if another process received it."""
        return self._received or "SIGTERM"

    def should_stop(self, step: int) -> bool:
        """Returns whether all processes have to save and end after step `step`. Call it once after each step, with its
        number."""
        return bool(self._received) if self._single else multihost_utils.reached_preemption_sync_point(step)


class _Output(io.TextIOBase):
    """Standard output that can be lost: the text then goes nowhere, and `on_lost()` is called."""

    def __init__(self, stream, on_lost):
        self._stream, self._on_lost = stream, on_lost

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        """Writes a text and returns its length."""
        self._call(lambda: self._stream.write(text))
        return len(text)

    def flush(self):
        """Writes what is pending."""
        self._call(lambda: self._stream.flush())

    def _call(self, method) -> None:
        try:
            method()
        except OSError:
            with contextlib.suppress(OSError):  # what is pending would fail again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            self._on_lost()


def _say(text: str) -> None:
    """Prints a line to stderr, which may be closed."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)
