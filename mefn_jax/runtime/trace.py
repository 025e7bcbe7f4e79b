"""Profiling: a trace of some steps, for TensorBoard's profiler or Perfetto (`train.py --profile=START:N`)."""

import re

import jax

from mefn_jax.errors import ConfigError
from mefn_jax.runtime.console import print0, tolerate_faults
from mefn_jax.runtime.storage import Mirror


class Profile:
    """Recorder of a trace of the N steps after step START into WORKDIR/profile. `steps` is "START:N", or "" for no
    trace. A fault while recording is printed and ends the trace, not the training."""

    def __init__(self, steps: str):
        match = re.fullmatch(r"(\d+):([1-9]\d*)", steps) if steps else None
        if steps and not match:
            raise ConfigError(f"--profile={steps}: give START:N, the first step and the number of steps, e.g. 20:5")
        self._first, number = (int(match[1]), int(match[2])) if match else (-1, 0)
        self._end, self._workdir, self._mirror, self._reached = self._first + number, None, None, not steps

    def on_step_start(self, step: int, workdir, state) -> None:
        """Starts the trace at its first step. Call it before each step, with the step's index from 0 and the state
        before it."""
        if step == self._first:
            jax.block_until_ready(state)  # otherwise the trace contains earlier steps that are still running
            self._workdir, self._reached = workdir, True
            with tolerate_faults("the profile"):
                mirror = Mirror(workdir)  # copies the trace to a remote workdir
                jax.profiler.start_trace(str(mirror.local / "profile"))
                self._mirror = mirror

    def on_step_end(self, step: int, result) -> None:
        """Ends the trace if this step (index from 0) is its last, after waiting for `result`. Call it after each
        step."""
        if self._mirror and step + 1 == self._end:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Ends a trace that is still running and prints where it is; warns if the first step was not reached."""
        if not self._reached:
            print0(f"warning: no profile: this run did no step after step {self._first}")
        if self._mirror:
            mirror, self._mirror = self._mirror, None
            with tolerate_faults("the profile"):
                jax.profiler.stop_trace()
                mirror.copy()
                mirror.close()
                print0(f"profile of the {self._end - self._first} steps after {self._first} in {self._workdir}/profile")
