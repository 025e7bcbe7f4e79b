"""Checkpoints with Orbax: `{state, meta}` by step under WORKDIR/checkpoints; the latest and the best by val rSum."""

import contextlib
import functools
import hashlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from mefn_jax.errors import CheckpointError, UnreadableCheckpointError, reason
from mefn_jax.runtime.storage import absolute

v1 = ocp.v1
PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy"),
    *("pillow", "simplejpeg", "opencv-python-headless"),  # these make pixels of files
)


def versions() -> dict[str, str]:
    """Python's and the packages' versions."""
    return {"python": sys.version.split()[0]} | {p: importlib.metadata.version(p) for p in PACKAGES}


def git_commit() -> str:
    """The checkout's commit, with "+changes" if files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*words):
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _is_no_orbax_trace(record) -> bool:
    return not (record.exc_info and "orbax" in record.pathname)


@functools.cache
def silence_orbax() -> None:
    """Drops what Orbax's threads print of a failed save, hundreds of lines: the failure also reaches us as an
    exception, which is reported once."""
    logging.get_absl_logger().addFilter(_is_no_orbax_trace)
    show = sys.unraisablehook

    def show_others(unraisable) -> None:
        # TensorStore's writes that end after a failed save find Orbax's event loop closed.
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = show_others


def params_digest(params) -> str:
    """What tells parameters (a tree of arrays) from others: SHA-256 of their names and values."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        found.update(jax.tree_util.keystr(path).encode())
        found.update(np.ascontiguousarray(leaf))
    return found.hexdigest()


def code_digest() -> str:
    """A digest of the package's code: checkouts of one commit may have different changes."""
    package = Path(__file__).resolve().parents[1]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(package.rglob("*.py")))).hexdigest()[:12]


class Checkpoints:
    """The checkpoints of a workdir. A save is complete or invisible; use as a context manager, which waits for it."""

    def __init__(self, workdir, create: bool = False):
        """Opens them. Raises CheckpointError if there is no directory and `create` is not set."""
        silence_orbax()
        self.directory = absolute(workdir) / "checkpoints"
        if not create and not self.directory.is_dir():
            raise CheckpointError(f"{workdir}: no checkpoints here; give the --workdir of a training run")
        policies = v1.training.preservation_policies
        keep = [
            policies.LatestN(2),  # should the newest turn out to be unreadable
            policies.BestN(get_metric_fn=lambda m: m["rsum"], n=1, keep_checkpoints_without_metrics=False),
        ]
        self._pending, self._skipped = None, []
        self._checkpointer = v1.training.Checkpointer(
            self.directory,
            save_decision_policy=v1.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=policies.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=create,
        )

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.wait()
        finally:
            # A failed save has been reported by now; closing would report it again, in Orbax's words.
            with contextlib.suppress(Exception):
                self._checkpointer.close()

    @property
    def latest(self) -> int | None:
        """The newest complete step that was not skipped, or None."""
        return max((c.step for c in self._checkpointer.checkpoints if c.step not in self._skipped), default=None)

    @property
    def best(self) -> int | None:
        """The step with the highest val rSum, the newest of equals; the latest if none was evaluated."""
        scored = [(c.metrics["rsum"], c.step) for c in self._checkpointer.checkpoints if c.metrics]
        return max(scored)[1] if scored else self.latest

    def resolve_step(self, step: str) -> int:
        """The step that "best", "latest" or a number stands for. Raises CheckpointError if there is none."""
        steps = [c.step for c in self._checkpointer.checkpoints]
        if not steps:
            raise CheckpointError(f"{self.directory}: no complete checkpoint; train first")
        if step in ("best", "latest"):
            return self.best if step == "best" else self.latest
        if not step.isdigit() or int(step) not in steps:
            raise CheckpointError(f"--step={step}: not best, latest or one of {', '.join(map(str, steps))}")
        return int(step)

    def save(self, step: int, state, meta: dict, rsum: float | None = None) -> None:
        """Starts saving; waits for the save before. Raises CheckpointError if that one failed."""
        self.wait()
        self._saving = step
        with self._save_errors(step):
            self._pending = self._checkpointer.save_checkpointables_async(
                step, {"state": state, "meta": meta}, metrics=None if rsum is None else {"rsum": rsum}, overwrite=True
            )
            if self._pending is None:  # Orbax takes no step before the latest, and says nothing
                raise CheckpointError(f"{self.directory} has a checkpoint of a later step than {step}")

    def wait(self, seconds: float | None = None) -> None:
        """Returns when the save under way is complete. Raises CheckpointError if it failed, or takes so long."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._save_errors(self._saving):
                pending.result(seconds)

    def meta(self, step: int) -> dict:
        """What was saved beside the state: step, config, tokenizer, preprocessing, commit, versions."""
        with self._read_errors(step):
            return self._checkpointer.load_checkpointables(step, {"meta": None})["meta"]

    def restore(self, step: int, abstract_state):
        """The state at `step` into the shapes and shardings of `abstract_state`; subtrees left out are not read."""
        context = v1.Context()
        context.pytree.loading.partial_load = True
        with self._read_errors(step), context:
            found = self._checkpointer.load_checkpointables(step, {"state": abstract_state})["state"]
        # Orbax leaves a shape where the checkpoint has nothing.
        for path, leaf in jax.tree_util.tree_leaves_with_path(found):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise CheckpointError(
                    f"{self.directory / str(step)} has no {name}: it is of another model, loss or optimiser; give the "
                    "configuration that it was trained with, or another --workdir"
                )
        return found

    def skip(self, error: CheckpointError) -> None:
        """Goes on without the latest step, which cannot be read for this `error`. Raises CheckpointError if there is no
        other."""
        skipped = [*self._skipped, self.latest]
        if len(skipped) == len(self._checkpointer.checkpoints):
            raise CheckpointError(f"{error}; there is no other that can be read: remove it to begin anew") from error
        self._skipped = skipped

    def quarantine(self) -> None:
        """Moves what was skipped to WORKDIR/unreadable, where nothing looks for it. Raises CheckpointError."""
        unreadable = self.directory.parent / "unreadable"
        try:
            unreadable.mkdir(parents=True, exist_ok=True)
            for step in self._skipped:
                earlier = len(list(unreadable.glob(f"{step}*")))  # moved at this step before
                (self.directory / str(step)).rename(unreadable / (f"{step}-{earlier}" if earlier else str(step)))
        except OSError as e:
            raise CheckpointError(f"{self.directory}: cannot move {self._skipped} away ({reason(e)})") from e

    def reload(self) -> None:
        """Looks at what there is now."""
        self._checkpointer.reload()
        self._skipped = []

    def _save_errors(self, step):
        return _wrap(
            lambda e: (
                f"{self.directory}: could not save the checkpoint of step {step} ({reason(e)}). Earlier "
                "checkpoints are intact: free some space and run the same command to go on from the latest"
            )
        )

    def _read_errors(self, step):
        def message(e):
            return f"{self.directory / str(step)}: cannot be read as a checkpoint ({reason(e)})"

        return _wrap(message, UnreadableCheckpointError)


@contextlib.contextmanager
def _wrap(message, kind=CheckpointError):
    """Turns any exception in its body into a `kind` with `message(exception)`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as e:  # Orbax and TensorStore raise many kinds
        raise kind(message(e)) from e
