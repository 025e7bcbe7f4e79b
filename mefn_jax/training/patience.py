"""Counts the evaluations on val since the best, so that a run stops when its rSum no longer rises (`train.patience`).

The record is kept whether or not a run stops by it. A checkpoint is saved before its own evaluation, so it stores the
record of the evaluations before; its `rsum.json` completes it. A run that resumes therefore stops where it would have
stopped.
"""

import dataclasses

from mefn_jax.runtime.checkpoint import Checkpoints


@dataclasses.dataclass(frozen=True)
class BestRecord:
    """The best evaluation on val so far, and how many came after it.

    Attributes:
        rsum: its rSum; None before the first evaluation.
        step: the step that it belongs to.
        since: the number of evaluations after it, none of which was above it.
    """

    rsum: float | None = None
    step: int = 0
    since: int = 0

    def add(self, step: int, rsum: float) -> "BestRecord":
        """Returns the record after one more evaluation. An equal rSum is not better."""
        if self.rsum is None or rsum > self.rsum:
            return BestRecord(rsum, step)
        return dataclasses.replace(self, since=self.since + 1)

    def is_exhausted(self, patience: int) -> bool:
        """Returns whether a run stops, with `patience` evaluations without a higher rSum; 0: it never does."""
        return 0 < patience <= self.since


def restore_record(meta: dict, checkpoints: Checkpoints) -> BestRecord:
    """Returns the record at a checkpoint, whose metadata is `meta`, with its own evaluation if that was made. A run of
    an earlier format begins to count at its checkpoint."""
    record, step = BestRecord(**(meta["best"] or {})), meta["step"]
    rsum = checkpoints.recorded_rsum(step)
    return record if rsum is None else record.add(step, rsum)
