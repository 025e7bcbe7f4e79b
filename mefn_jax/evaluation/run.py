"""A trained model and a gallery: which checkpoint or export a command evaluates, and on which images and captions.

The verbs of `eval.py` share the flags that name them.
"""

import dataclasses
import functools
import hashlib
import re
from pathlib import Path

from absl import flags
from etils import epath

from mefn_jax.config import require_local
from mefn_jax.data.mixture import parse_mixture
from mefn_jax.data.split import SPLIT_ALIASES
from mefn_jax.errors import CheckpointError, ConfigError
from mefn_jax.evaluation.evaluator import load_checkpoint
from mefn_jax.evaluation.exported import is_exported, list_replaced, load_exported, read_metadata
from mefn_jax.evaluation.hub import download_model, is_hub_name
from mefn_jax.runtime.checkpoint import Checkpoints
from mefn_jax.runtime.cli import define_path_flag, parse_count
from mefn_jax.runtime.storage import expand_home, resolve_directory


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A checkpoint of a training run, or an exported model (docs/export.md).

    Attributes:
        workdir: the directory of the run, which may be gs://BUCKET/PATH, the folder of an exported model, or its name
            OWNER/NAME on the Hugging Face hub: text of this form that is no path here (`hub.is_hub_name`).
        step: "best" (by rSum on val), "latest" or the number of a step.
        ema: whether the averaged parameters are taken (`train.ema_decay`).

    Raises ConfigError for a `step` that is none of these.
    """

    workdir: str | Path
    step: str | int = "best"
    ema: bool = False

    def __post_init__(self):
        if str(self.step) not in ("best", "latest") and parse_count(str(self.step)) is None:
            raise ConfigError(f"--step={self.step}: not best, latest or the number of a step")

    @functools.cached_property
    def directory(self) -> epath.Path:
        """Returns the workdir or the folder; that of a model on the hub is downloaded if necessary. Raises ConfigError
        for a URL that is not gs://, or a bucket that cannot be used, CheckpointError if the hub has no such model."""
        if is_hub_name(self.workdir):
            return epath.Path(download_model(self.workdir))
        return resolve_directory("--workdir", self.workdir)

    @property
    def results_directory(self) -> epath.Path:
        """Returns the directory below which a command writes its results: the workdir or the folder itself, but
        `runs/OWNER/NAME` here for a model on the hub, whose folder is a cache."""
        return epath.Path("runs") / self.workdir if is_hub_name(self.workdir) else self.directory

    @property
    def is_averaged(self) -> bool:
        """Returns whether the parameters are averaged ones: taken by `ema`, or exported so."""
        return self.ema or (is_exported(self.directory) and read_metadata(self.directory)["ema"])

    def load(self):
        """Loads the model: `(Evaluator, params, step)`. Raises as `evaluator.load_checkpoint` and
        `exported.load_exported` do, and CheckpointError for an exported model that a killed export had moved away."""
        if not self.directory.exists() and (replaced := list_replaced(self.directory)):
            raise CheckpointError(
                f"{self.directory}: an export to this folder was killed before its end; {replaced[-1]} is the model "
                "that it was to replace: rename that to this, or export again"
            )
        load_model = load_exported if is_exported(self.directory) else load_checkpoint
        return load_model(self.directory, str(self.step), self.ema)

    def read_meta(self, step: int) -> dict:
        """Returns what the checkpoint of a step, or the exported model, stores besides its state, without checksums
        (`Checkpoints.meta`)."""
        if is_exported(self.directory):
            return read_metadata(self.directory)["checkpoint"]
        with Checkpoints(self.directory) as checkpoints:
            return {key: value for key, value in checkpoints.meta(step).items() if key != "checksum"}

    def output_dir(self, split: str, out: str = "", data_dir: str = "") -> epath.Path:
        """Returns the directory of an evaluation's files: `out`, or `eval/<split>/` in the `results_directory`.

        Averaged parameters have `eval/<split>_ema/`. `data_dir`: a data set that the run was not trained on, whose name
        is appended with a few letters of the digest of its path.
        """
        name = split + "_ema" * self.is_averaged
        if data_dir:
            path = Path(data_dir).resolve()
            label = re.sub(r"[^\w.-]+", "_", path.name)
            name += f"_{label}-{hashlib.sha256(str(path).encode('utf-8', 'surrogateescape')).hexdigest()[:6]}"
        return resolve_directory("--out", out) if out else self.results_directory / "eval" / name


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Images and captions that a model ranks: a split of a data set, whole or cut into folds.

    Attributes:
        data_dir: a prepared data set; empty for the one that the model's configuration names.
        split: "train", "val", "test" or "held_out".
        folds: numbers of consecutive folds of the images, over which metrics are averaged; 1 is the whole gallery.

    Raises ConfigError if `data_dir` is a URL or a mixture.
    """

    data_dir: str = ""
    split: str = "test"
    folds: tuple[int, ...] = (1,)

    def __post_init__(self):
        require_local("--data_dir", self.data_dir)
        if len(parse_mixture(self.data_dir)) > 1:
            raise ConfigError(f"--data_dir={self.data_dir}: give one data set; a mixture is evaluated on its first")


def define_run_flags() -> None:
    """Defines the flags that name a trained run."""
    define_path_flag(
        "workdir",
        "runs/shapes",
        "Directory of the training run, may be gs://BUCKET/PATH; or an exported model: its folder, or OWNER/NAME.",
    )
    define_checkpoint_flags()


def define_checkpoint_flags() -> None:
    """Defines the flags that choose a checkpoint of a run."""
    flags.DEFINE_string("step", "best", "Checkpoint: best (by val rSum), latest, or a step.")
    flags.DEFINE_bool("ema", False, "Take the averaged parameters (train.ema_decay).")


def define_split_flag() -> None:
    """Defines the flag that names a split."""
    flags.DEFINE_string("split", "test", "train, val (or dev), test or held_out.")


def define_gallery_flags(with_folds: bool = True) -> None:
    """Defines the flags that name a gallery."""
    define_split_flag()
    if with_folds:
        flags.DEFINE_list(
            "folds",
            ["1"],
            "Numbers of consecutive folds of the images to average over; 1,5: COCO's 5K and 1K at once.",
        )
    define_path_flag("data_dir", "", "Prepared data set; default: the one of the configuration.")


def define_scores_flag() -> None:
    """Defines the flag that names a file for all scores."""
    define_path_flag("save_scores", "", "A .npy file for the scores of all pairs, float32 (images, captions).")


def run_from_flags() -> TrainedRun:
    """Returns the run that the flags of `define_run_flags` name."""
    return _run_of_workdir(flags.FLAGS.workdir)


def runs_from_flags() -> list[TrainedRun]:
    """Returns the runs that `--workdir` names, separated by commas."""
    return [_run_of_workdir(expand_home(text)) for text in flags.FLAGS.workdir.split(",")]


def _run_of_workdir(text: str) -> TrainedRun:
    """Returns the run of a value of `--workdir`, with the other flags."""
    f = flags.FLAGS
    return TrainedRun(text if f["workdir"].present else Path(text), f.step, f.ema)  # the default is no name on the hub


def split_from_flags() -> str:
    """Returns the name of the split that `--split` names, by this name or by another accepted one."""
    return SPLIT_ALIASES.get(flags.FLAGS.split, flags.FLAGS.split)


def gallery_from_flags() -> Gallery:
    """Returns the gallery that the flags of `define_gallery_flags` name. Raises ConfigError."""
    f = flags.FLAGS
    folds = f.folds if "folds" in f else ["1"]
    numbers = tuple(map(parse_count, folds))
    if not numbers or not all(numbers):
        raise ConfigError(f"--folds={','.join(folds)}: give numbers of at least 1")
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"--folds={','.join(folds)}: give every number once")
    return Gallery(f.data_dir, split_from_flags(), numbers)
