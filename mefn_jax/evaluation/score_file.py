"""The file of all scores of a gallery that `--save_scores` writes."""

import contextlib
import os
from pathlib import Path

import jax
import numpy as np

from mefn_jax.data.split import Split
from mefn_jax.errors import ConfigError
from mefn_jax.evaluation.results import RESULT_FILES
from mefn_jax.evaluation.run import Gallery
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.outputs import check_output_directory, check_output_file
from mefn_jax.runtime.storage import is_remote


def check_outputs(out: str, save_scores: str, gallery: Gallery, files: dict = RESULT_FILES) -> None:
    """Checks `--out` and `--save_scores` before any work; either may be empty. Raises ConfigError."""
    if out:
        check_output_directory("--out", out, files)
    check_score_file(save_scores, gallery)


def check_score_file(path: str, gallery: Gallery, split: Split | None = None) -> None:
    """Checks `--save_scores` before any work; an empty path is fine. With the split, also the shape of what is there.

    Raises ConfigError if the file cannot be written, if it would replace anything but scores of a gallery of this size,
    or if the folds leave out the whole gallery.
    """
    if not path:
        return
    if is_remote(path):
        raise ConfigError(f"--save_scores={path}: give a file on this machine")
    shape = (split.num_images, split.num_captions) if split else None
    check_output_file("--save_scores", path, (".npy",), lambda file: is_score_file(file, shape))
    if 1 not in gallery.folds:
        raise ConfigError("--save_scores needs the whole gallery: add 1 to --folds")


def is_score_file(path: Path, shape: tuple[int, int] | None = None) -> bool:
    """Returns whether a file is an array as `--save_scores` writes it, float32 `(I, C)`; `shape`: of this shape."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    is_matrix = isinstance(array, np.ndarray) and array.dtype == np.float32 and array.ndim == 2
    return is_matrix and shape in (None, array.shape)


@contextlib.contextmanager
def open_score_file(path, split: Split):
    """Yields a float32 array `(I, C)` on disk, to become the .npy file `path`; None without a path.

    The file appears under its name only if the body of the `with` statement succeeds. Process 0 alone writes it: the
    others get None. Raises ConfigError if it cannot be written.
    """
    if not path or jax.process_index():
        yield None
        return
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        array = np.lib.format.open_memmap(unfinished, "w+", np.float32, (split.num_images, split.num_captions))
    except OSError as e:
        raise ConfigError(f"--save_scores={path}: cannot be written ({e})") from e
    try:
        yield array
        array.flush()
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    print0(f"wrote {path}: scores float32 {split.num_images} x {split.num_captions}, images by captions")
