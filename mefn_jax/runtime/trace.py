"""A trace of some steps, for TensorBoard's profiler or Perfetto (`train.py --profile=START:N`)."""

import re

import jax

from mefn_jax.errors import ConfigError
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.storage import Mirror


class Profile:
    """Records N steps after START are done into WORKDIR/profile, of "START:N"; of "" none."""

    def __init__(self, steps: str):
        found = re.fullmatch(r"(\d+):([1-9]\d*)", steps) if steps else None
        if steps and not found:
            raise ConfigError(f"--profile={steps}: give START:N, the first step and how many, e.g. 20:5")
        self._first, number = (int(found[1]), int(found[2])) if found else (-1, 0)
        self._end, self._workdir, self._mirror, self._begun = self._first + number, None, None, not steps

    def on_step_start(self, step: int, workdir, state) -> None:
        """To be called before each step, with its number from 0 and the state that it begins from."""
        if step == self._first:
            jax.block_until_ready(state)  # or the trace would have the steps before, which are still running
            self._workdir, self._mirror = workdir, Mirror(workdir)  # which copies it where the workdir is remote
            self._begun = True
            jax.profiler.start_trace(str(self._mirror.local / "profile"))

    def on_step_end(self, step: int, result) -> None:
        """To be called after each step, with what it returned."""
        if self._mirror and step + 1 == self._end:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Ends a trace that is still running, and says where it is, or that there is none."""
        if not self._begun:
            print0(f"warning: no profile: this run did not begin the step after {self._first}")
        if self._mirror:
            mirror, self._mirror = self._mirror, None
            jax.profiler.stop_trace()
            mirror.copy()
            mirror.close()
            print0(f"profile of the {self._end - self._first} steps after {self._first} in {self._workdir}/profile")
