"""Preemption: SIGTERM announces that the machine is about to be taken away. All processes then save at the same step
and end."""

import signal

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Listener for SIGTERM. Use it as a context manager in the main thread."""

    def __enter__(self):
        self._received, self._single = False, jax.process_count() == 1
        if self._single:  # with several processes, JAX's own service listens and chooses the step
            self._previous_handler = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *_):
        if self._single:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def _on_signal(self, *_):
        self._received = True

    def should_stop(self, step: int) -> bool:
        """Returns whether all processes have to save and end after step `step`. Call it once after each step, with its
        number."""
        return self._received if self._single else multihost_utils.reached_preemption_sync_point(step)
