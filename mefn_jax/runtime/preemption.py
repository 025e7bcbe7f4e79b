"""A machine that is about to be taken away says so by SIGTERM: all processes then save at the same step and end."""

import signal

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Whether this run was told to end. Use as a context manager, in the main thread."""

    def __enter__(self):
        self._told, self._alone = False, jax.process_count() == 1
        if self._alone:  # of several, JAX's own service hears it and chooses the step
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *_):
        if self._alone:
            signal.signal(signal.SIGTERM, self._before)

    def _hear(self, *_):
        self._told = True

    def should_stop(self, step: int) -> bool:
        """True after the step at which all processes are to save and end. To be asked once a step, with its number."""
        return self._told if self._alone else multihost_utils.reached_preemption_sync_point(step)
