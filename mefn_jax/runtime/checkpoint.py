"""Checkpoints with Orbax: `{state, meta}` by step under WORKDIR/checkpoints. The latest two and the best by val rSum
are kept. The rSum of a step is recorded in its directory after the checkpoint is complete, so that an evaluation that
fails costs no training."""

import contextlib
import functools
import hashlib
import json
import math
import sys
from logging import CRITICAL, getLogger

import jax
import orbax.checkpoint as ocp
from absl import logging

from mefn_jax.errors import CheckpointError, UnreadableCheckpointError, reason
from mefn_jax.runtime.checkpoint_format import CHECKPOINT_FORMAT
from mefn_jax.runtime.checksum import compute_checksums, describe_leaves
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.multihost import on_all_processes
from mefn_jax.runtime.storage import absolute, write_atomic

v1 = ocp.v1

GONE = "is gone: a training that goes on removes old checkpoints; run the command again"


def _is_no_orbax_trace(record) -> bool:
    """Returns whether a log record is anything but a traceback from Orbax."""
    return not (record.exc_info and "orbax" in record.pathname)


@functools.cache
def silence_orbax() -> None:
    """Drops the hundreds of lines that Orbax's threads print about a failed save or read: the failure also reaches the
    caller as an exception, which is reported once."""
    getLogger("asyncio").setLevel(CRITICAL)  # lists the other tasks of a failed read
    logging.get_absl_logger().addFilter(_is_no_orbax_trace)
    show = sys.unraisablehook

    def show_others(unraisable) -> None:
        # TensorStore's writes may end after a failed save, when Orbax's event loop is closed already.
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = show_others


class Checkpoints:
    """Checkpoints of a workdir. A save is complete or invisible. Use the class as a context manager, which waits for
    the last save."""

    def __init__(self, workdir, create: bool = False, check_lock=None):
        """Opens the directory of checkpoints. `check_lock()` is called before each save: it raises LockError if another
        process writes here. Raises CheckpointError if the directory does not exist and `create` is not set."""
        self._check_lock = check_lock or (lambda: None)
        silence_orbax()
        self.directory = absolute(workdir) / "checkpoints"
        if not create and not self.directory.is_dir():
            raise CheckpointError(f"{workdir}: no checkpoints here; give the --workdir of a training run")
        self._pending, self._skipped = None, []
        with _wrap(lambda e: f"{self.directory}: cannot be read ({reason(e)})"):
            self._checkpointer = v1.training.Checkpointer(
                self.directory,
                save_decision_policy=v1.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=_KeepLatestAndBest(lambda: self.best),
                cleanup_tmp_directories=create,
            )
        self._rsums = self._read_rsums()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.wait()
        finally:
            # A failed save has been reported already; closing would report it again in Orbax's words.
            with contextlib.suppress(Exception):
                self._checkpointer.close()

    @property
    def latest(self) -> int | None:
        """Returns the newest complete step that was not skipped; None without any."""
        return max(
            (checkpoint.step for checkpoint in self._checkpointer.checkpoints if checkpoint.step not in self._skipped),
            default=None,
        )

    @property
    def best(self) -> int | None:
        """Returns the step with the highest val rSum, the newest of several equal ones; the latest step if none was
        evaluated."""
        steps = {checkpoint.step for checkpoint in self._checkpointer.checkpoints}
        candidates = [(rsum, step) for step, rsum in self._rsums.items() if step in steps]
        return max(candidates)[1] if candidates else self.latest

    def resolve_step(self, step: str) -> int:
        """Returns the step for "best", "latest" or a number. Raises CheckpointError if there is no such checkpoint."""
        steps = [checkpoint.step for checkpoint in self._checkpointer.checkpoints]
        if not steps:
            raise CheckpointError(f"{self.directory}: no complete checkpoint; train first")
        if step in ("best", "latest"):
            return self.best if step == "best" else self.latest
        if not step.isdecimal() or int(step) not in steps:
            raise CheckpointError(f"--step={step}: not best, latest or one of {', '.join(map(str, steps))}")
        return int(step)

    def save(self, step: int, state, meta: dict) -> None:
        """Starts a save, after the previous one has finished. Raises CheckpointError if the previous save failed, or if
        a later step has been saved."""
        self._check_lock()
        self.wait()
        self._saving = step
        self._rsums.pop(step, None)  # of a checkpoint that is replaced
        meta = meta | {"step": step}
        checksum = {"meta": _digest_meta(meta), "leaves": describe_leaves(state), "state": compute_checksums(state)}
        meta["checksum"] = json.dumps(checksum)
        with self._save_errors(step):
            self._pending = self._checkpointer.save_checkpointables_async(
                step, {"state": state, "meta": meta}, overwrite=True
            )
            if self._pending is None:  # Orbax silently refuses a step before the latest
                raise CheckpointError(f"{self.directory} has a checkpoint of a later step than {step}")

    def wait(self, seconds: float | None = None) -> None:
        """Waits until the running save is complete. Raises CheckpointError if it fails or takes longer than
        `seconds`."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._save_errors(self._saving):
                pending.result(seconds)

    def record_rsum(self, step: int, rsum: float) -> None:
        """Records the rSum of a step on val, which chooses the best, when its save is complete. Raises CheckpointError
        if the save failed, or if the record cannot be written."""
        self.wait()
        self._rsums[step] = rsum
        if jax.process_index() == 0:
            with self._save_errors(step):
                write_atomic(self._rsum_path(step), json.dumps({"rsum": rsum}).encode())

    def is_evaluated(self, step: int) -> bool:
        """Returns whether the rSum of a step is recorded."""
        return step in self._rsums

    def recorded_rsum(self, step: int) -> float | None:
        """Returns the rSum of a step on val; None if it is not recorded."""
        return self._rsums.get(step)

    def _rsum_path(self, step: int):
        return self.directory / str(step) / "rsum.json"

    def _read_rsums(self) -> dict[int, float]:
        """Returns the rSum of each step that was evaluated. Prints a warning for one that cannot be read, which then
        counts as not evaluated."""
        rsums = {}
        for checkpoint in self._checkpointer.checkpoints:
            step = checkpoint.step
            path, metrics = self._rsum_path(step), checkpoint.metrics  # these are of format 1
            try:
                rsum = (metrics or json.loads(path.read_bytes()))["rsum"]
                if not (isinstance(rsum, int | float) and math.isfinite(rsum)):
                    raise ValueError(f"rsum is {rsum!r}")
                rsums[step] = float(rsum)
            except FileNotFoundError:  # not evaluated
                continue
            except Exception as e:  # damaged, or an error of the bucket's client
                print0(f"warning: {path}: cannot be read ({reason(e)}); step {step} counts as not evaluated")
        return rsums

    def meta(self, step: int) -> dict:
        """Returns what was saved besides the state: format, step, examples, config, tokenizer, preprocessing, commit,
        versions, best, negatives, in the current format, and `checksum`: the SHA-256 of the rest (`meta`), and of each
        leaf of the state its type and shape (`leaves`) and its checksum (`state`), None for a checkpoint of format 1.

        Raises UnreadableCheckpointError, also if the content is not what was saved, and CheckpointError for a format
        that it cannot read, and for a directory that was renamed."""
        path = self.directory / str(step)
        with self._read_errors(step):
            meta = self._checkpointer.load_checkpointables(step, {"meta": None})["meta"]
        if isinstance(meta, dict) and meta.get("checksum") is not None:
            with self._read_errors(step):
                meta["checksum"] = json.loads(meta["checksum"])
                if meta["checksum"]["meta"] != _digest_meta(meta):
                    raise UnreadableCheckpointError(f"{path}: cannot be read as a checkpoint (its metadata is damaged)")
        with self._read_errors(step):  # an upgrade may miss a key
            meta = CHECKPOINT_FORMAT.upgrade(meta, path)
        if meta.get("step") != step:
            raise CheckpointError(f"{path}: is the checkpoint of step {meta.get('step')}; give it its name back")
        return meta

    def restore(self, step: int, abstract_state):
        """Returns the state at `step` in the shapes and shardings of `abstract_state`. Subtrees that are left out there
        are not read. Several processes call this together. Raises CheckpointError if the checkpoint lacks a part,
        UnreadableCheckpointError if it cannot be read, or is not what was saved."""
        checksum = on_all_processes(lambda: self._check_leaves(step, abstract_state))
        state = on_all_processes(lambda: self._load(step, abstract_state))
        if checksum is not None:
            self._verify(step, state, checksum["state"])
        return state

    def _check_leaves(self, step: int, abstract_state) -> dict | None:
        """Returns the checksums of a checkpoint. Raises CheckpointError, naming the first, if leaves of
        `abstract_state` are not in it, or have another type or shape there."""
        checksum = self.meta(step)["checksum"]
        if checksum is not None:
            for name, kind in describe_leaves(abstract_state).items():
                saved = checksum["leaves"].get(name)
                if saved is None:
                    raise self._lacks(step, name)
                if saved != kind:
                    raise self._lacks(step, f"{name} of {kind}, but of {saved}")
        return checksum

    def _lacks(self, step: int, part: str) -> CheckpointError:
        """Returns the error of a checkpoint without a part of the state that is wanted."""
        return CheckpointError(
            f"{self.directory / str(step)} has no {part}: it belongs to another model, loss or optimizer; give the "
            "configuration that it was trained with, or another --workdir"
        )

    def _verify(self, step: int, state, saved: dict) -> None:
        """Raises UnreadableCheckpointError, naming the first, if leaves of a state are not what was saved."""
        for name, value in compute_checksums(state).items():
            if saved.get(name) != value:
                raise UnreadableCheckpointError(
                    f"{self.directory / str(step)}: cannot be read as a checkpoint ({name} is damaged: its checksum is "
                    "not that of what was saved)"
                )

    def _load(self, step: int, abstract_state):
        context = v1.Context()
        context.pytree.loading.partial_load = True
        with self._read_errors(step), context:
            state = self._checkpointer.load_checkpointables(step, {"state": abstract_state})["state"]
        # Where the checkpoint has nothing, Orbax leaves the shape in place of an array.
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise self._lacks(step, jax.tree_util.keystr(path, simple=True, separator="/"))
        return state

    def skip(self, error: CheckpointError) -> None:
        """Skips the latest step, which cannot be read because of `error`. Raises CheckpointError if no other step is
        left."""
        skipped = [*self._skipped, self.latest]
        if len(skipped) == len(self._checkpointer.checkpoints):
            raise CheckpointError(f"{error}; there is no other that can be read: remove it to start anew") from error
        self._skipped = skipped

    def quarantine(self) -> None:
        """Moves the skipped steps to WORKDIR/unreadable, outside the directory of checkpoints. Raises CheckpointError
        if they cannot be moved."""
        unreadable = self.directory.parent / "unreadable"
        try:
            unreadable.mkdir(parents=True, exist_ok=True)
            for step in self._skipped:
                earlier = len(list(unreadable.glob(f"{step}*")))  # copies of this step that were moved before
                (self.directory / str(step)).rename(unreadable / (f"{step}-{earlier}" if earlier else str(step)))
        except OSError as e:
            raise CheckpointError(f"{self.directory}: cannot move the steps {self._skipped} away ({reason(e)})") from e

    def reload(self) -> None:
        """Lists the checkpoints on disk anew and forgets the skipped steps."""
        self._checkpointer.reload()
        self._skipped, self._rsums = [], self._read_rsums()

    def _save_errors(self, step):
        """Returns a context in which a failed save becomes a CheckpointError that says what to do."""
        return _wrap(
            lambda e: (
                f"{self.directory}: could not save the checkpoint of step {step} ({reason(e)}). Earlier "
                "checkpoints are intact: free some space and run the same command to resume from the latest"
            )
        )

    def _read_errors(self, step):
        """Returns a context in which a failed read becomes an UnreadableCheckpointError."""

        def message(e):
            if not (self.directory / str(step)).exists():
                return f"{self.directory / str(step)}: {GONE}"
            return f"{self.directory / str(step)}: cannot be read as a checkpoint ({reason(e)})"

        return _wrap(message, UnreadableCheckpointError)


def _digest_meta(meta: dict) -> str:
    """Returns the SHA-256 of the metadata of a checkpoint, without its checksums."""
    content = {key: value for key, value in meta.items() if key != "checksum"}
    # Orbax returns tuples as lists, and numbers as NumPy's.
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=lambda x: x.item()).encode()).hexdigest()


class _KeepLatestAndBest:
    """Orbax's preservation policy that keeps the latest two checkpoints (the second replaces the newest if that is
    unreadable) and the step that `best()` returns."""

    def __init__(self, best):
        self._best = best

    def should_preserve(self, checkpoints, *, context):
        """Returns whether to keep each of the checkpoints, which are in the order of their steps."""
        keep = {*[checkpoint.step for checkpoint in checkpoints][-2:], self._best()}
        return [checkpoint.step in keep for checkpoint in checkpoints]


@contextlib.contextmanager
def _wrap(message, kind=CheckpointError):
    """Turns any exception in its body, except a CheckpointError, into a `kind` with the text `message(exception)`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as e:  # Orbax and TensorStore raise many types
        raise kind(message(e)) from e
