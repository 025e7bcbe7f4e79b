"""Makes an index: a folder of images, encoded once, to be searched by captions (docs/evaluation.md).

`INDEX/` has one row for each image: `images.json` (names below the folder), `embeddings.npy` float32 `(I, D)` (the unit
vectors by which candidates are found), and, if the matcher scores fragments, `pooled.npy` `(I, D)`, `fragments.npy`
`(I, N, D)` and `mask.npy` bool `(I, N)`. All arrays are plain NumPy files, which searching maps into memory.
`index.json` is the metadata: the number of the format, the checkpoint, the folder, the arrays that exist, the number of
rows written, and the images that could not be decoded. `index_images` also brings an index up to date with its folder
(`index_files.py`).
"""

import dataclasses
import time
from pathlib import Path

import grain
import jax
import numpy as np
from tqdm import tqdm

from mefn_jax.config import require_local
from mefn_jax.data import images
from mefn_jax.data.digests import digest_text
from mefn_jax.data.pipeline import pad_rows
from mefn_jax.errors import ConfigError, DataError, TrainingError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.evaluation.run import TrainedRun
from mefn_jax.features import Features
from mefn_jax.retrieval.image_folder import ImageFolder, find_images
from mefn_jax.retrieval.index_files import (
    COMMIT_FILE,
    ENCODED,
    UNDECODABLE,
    GrowingIndex,
    check_checkpoint,
    check_index_directory,
    commit_update,
    open_array,
    open_growing,
    read_index,
)
from mefn_jax.retrieval.mapped_rows import gather_rows
from mefn_jax.runtime.console import print0, printable
from mefn_jax.runtime.lock import hold_lock
from mefn_jax.runtime.provenance import params_digest
from mefn_jax.runtime.sharding import round_up
from mefn_jax.runtime.storage import SAVE_SECONDS


@dataclasses.dataclass(frozen=True)
class Index:
    """An opened index of I images, with its arrays mapped into memory.

    Attributes:
        folder: the folder of the images.
        names: their paths below it.
        readable: bool `(I,)`, False for an image that could not be decoded: its rows have no meaning.
        embeddings: float32 `(I, D)`.
        pooled, fragments, mask: the images' Features; None if the matcher scores `embeddings` alone.
    """

    folder: Path
    names: list[str]
    readable: np.ndarray
    embeddings: np.ndarray
    pooled: np.ndarray | None = None
    fragments: np.ndarray | None = None
    mask: np.ndarray | None = None

    def features(self, rows: np.ndarray) -> Features:
        """Returns the Features of some images, read from the files."""
        return Features(*(gather_rows(x, rows) for x in (self.fragments, self.mask, self.pooled)))


def index_images(run: TrainedRun, folder, out) -> None:
    """Makes an index of a folder of images for a run (see `build_index`). Raises ConfigError for a model of regions."""
    require_local("--images", folder)
    require_local("--out", out)
    check_index_directory(Path(out))
    if not Path(folder).is_dir():
        raise DataError(f"--images={folder}: no such directory")
    evaluator, params, checkpoint_id = load_model(run)
    if evaluator.config.image.arch == "regions":
        raise ConfigError("--images: this model takes precomputed regions, not images")
    build_index(evaluator, params, checkpoint_id, folder, out)


def load_model(run: TrainedRun):
    """Loads a trained model: the Evaluator, its parameters, and a dict that identifies the checkpoint."""
    evaluator, params, step_number = run.load()
    checkpoint_id = {"workdir": str(run.directory), "step": step_number, "parameters": params_digest(params)}
    return evaluator, params, checkpoint_id | {"tokenizer": digest_text(evaluator.tokenizer.json)}


def build_index(evaluator: Evaluator, params, checkpoint_id: dict, folder, out) -> None:
    """Encodes all images below `folder` into the directory `out`; continues an index that was stopped, and brings one
    up to date that is of an earlier state of the folder.

    `checkpoint_id` identifies the checkpoint. An image that cannot be decoded is listed and left out. Raises DataError
    for a folder without images, ConfigError for an `out` that holds something else or has no room, and TrainingError
    if features are not finite.
    """
    if jax.process_count() > 1:
        raise ConfigError(
            "an index is made by one process, which may use several devices: run the command on one machine"
        )
    with hold_lock("--out", out):
        _build_index(evaluator, params, checkpoint_id, folder, out)


def _build_index(evaluator: Evaluator, params, checkpoint_id: dict, folder, out) -> None:
    folder, out = Path(folder).resolve(), Path(out)
    found = find_images(folder, excluded=out)
    found.print_left_out()
    check_index_directory(out, found.names)
    try:
        growing = open_growing(out, checkpoint_id, found)
        if len(growing.find_missing(found)):
            encode_missing(evaluator, params, growing, found)
        else:
            print0(f"{out}: all images are encoded already")
        if growing.path != out:
            commit_update(out, growing.path)
    except OSError as e:
        raise ConfigError(f"--out={out}: cannot be written ({e}); run the same command again to go on") from e
    print_summary(out, folder, len(found.names), growing.skipped)


def encode_missing(evaluator: Evaluator, params, growing: GrowingIndex, found: ImageFolder) -> None:
    """Encodes the images that an index lacks, with a progress bar on a terminal; saves the progress now and then."""
    config, missing, total = evaluator.config, growing.find_missing(found), len(found.names)
    growing.states[missing] = 0  # their rows may be overwritten from now on
    growing.save()
    size = round_up(config.eval.batch_size, evaluator.mesh.size)
    bar = tqdm(total=total, initial=total - len(missing), desc="encoding", unit=" images", disable=None)
    last_saved, resize = time.monotonic(), images.resize_from_config(config.image)
    names = [found.names[k] for k in missing]
    for first, pixels, is_undecodable in load_batches(found.folder, names, resize, size, config):
        part = slice(first, first + len(pixels))
        features = evaluator.encode_pixels(params, pad_rows(pixels, size), len(pixels))
        arrays = {"embeddings": evaluator.image_vectors(params, features)}
        if not evaluator.model.is_dual_encoder:
            arrays |= {"pooled": features.pooled, "fragments": features.fragments, "mask": features.mask}
        for x in arrays.values():
            require_finite(x, names[part], "features are")
        growing.write_rows(missing[part], arrays)
        growing.states[missing[part], :2] = found.files[missing[part]]
        growing.states[missing[part], 2] = np.where(is_undecodable, UNDECODABLE, ENCODED)
        bar.update(len(pixels))
        if time.monotonic() - last_saved > SAVE_SECONDS:
            growing.save()
            last_saved = time.monotonic()
    growing.save()
    bar.close()


def print_summary(out: Path, folder: Path, number: int, skipped: list[str]) -> None:
    """Prints the number of images of an index and those that were left out. Raises DataError if all were."""
    if skipped:
        examples = ", ".join(map(printable, skipped[:5])) + (", ..." if len(skipped) > 5 else "")
        print0(f"left out {len(skipped)} images that cannot be decoded: {examples} (all in {out}/index.json)")
    if len(skipped) == number:
        raise DataError(f"--images={folder}: no image in it can be decoded")
    print0(f"{out} has {number - len(skipped)} images")


def require_finite(values: np.ndarray, names: list[str], subject: str = "score is") -> None:
    """Raises TrainingError if any of `values (n, ...)`, a row for each name, is not finite; names the first such row.

    `subject` is the first part of the reason, such as "score is".
    """
    not_finite = ~np.isfinite(values.reshape(len(values), -1)).all(1)
    if not_finite.any():
        name = printable(names[np.argmax(not_finite)])
        raise TrainingError(f"{name}: its {subject} not finite; the parameters are not either, or the index is damaged")


def load_batches(folder: Path, names: list[str], resize, size: int, config):
    """Yields `(first, pixels uint8 (n, H, W, 3), is_undecodable bool (n,))` for batches of `size` images, the last one
    smaller; `first` is the position of the first in `names`. Undecodable images are black."""

    def load_batch(first):
        batch = names[first : first + size]
        pixels = np.zeros((len(batch), resize.size, resize.size, 3), np.uint8)
        is_undecodable = np.zeros(len(batch), bool)
        for k, name in enumerate(batch):
            try:
                pixels[k] = images.decode((folder / name).read_bytes(), resize, name)
            except (DataError, OSError):
                is_undecodable[k] = True
        return first, pixels, is_undecodable

    options = grain.ReadOptions(num_threads=config.data.threads, prefetch_buffer_size=2 * config.data.threads)
    yield from grain.MapDataset.range(0, len(names), size).map(load_batch).to_iter_dataset(options)


def open_index(path, checkpoint_id: dict | None = None) -> Index:
    """Opens an index.

    Raises ConfigError if it is not complete, or made by another checkpoint than `checkpoint_id`; DataError if it is
    damaged or none of its images could be decoded.
    """
    path = Path(path)
    check_index_exists(path)
    if (path / COMMIT_FILE).exists():
        raise ConfigError(f"--index={path}: an update of it was stopped; run python eval.py index again")
    metadata, names = read_index(path)
    if checkpoint_id:
        check_checkpoint(path, metadata["checkpoint"], checkpoint_id)
    if metadata["done"] < metadata["images"]:
        raise ConfigError(
            f"--index={path}: {metadata['done']} of {metadata['images']} images are encoded; run python eval.py index "
            "again"
        )
    skipped = set(metadata["skipped"])
    readable = np.array([name not in skipped for name in names])
    if not readable.any():
        raise DataError(f"--index={path}: none of its images could be decoded")
    arrays = {name: open_array(path / f"{name}.npy", len(names), "r") for name in metadata["arrays"]}
    if (path / COMMIT_FILE).exists() or read_index(path)[0] != metadata:
        raise ConfigError(f"--index={path}: has been replaced just now; run the same command again")
    return Index(Path(metadata["folder"]), names, readable, **arrays)


def check_index_exists(path) -> None:
    """Raises ConfigError if a directory has no index."""
    if not (Path(path) / "index.json").is_file():
        raise ConfigError(f"--index={path}: no index; make one with python eval.py index --images=FOLDER --out={path}")
