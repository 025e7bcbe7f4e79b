"""Makes an index: a folder of images, encoded once, to be searched by captions (docs/evaluation.md).

    python eval.py index --workdir=DIR --images=FOLDER --out=INDEX

`INDEX/` has one row for each image: `images.json` (names below the folder), `embeddings.npy` float32 `(I, D)` (the unit
vectors by which candidates are found), and, if the matcher scores fragments, `pooled.npy` `(I, D)`, `fragments.npy`
`(I, N, D)` and `mask.npy` bool `(I, N)`. All arrays are plain NumPy files, which searching maps into memory.
`index.json` is the metadata: the number of the format, the checkpoint, the folder, the arrays that exist, the number of
rows written, and the images that could not be decoded.
"""

import dataclasses
import functools
import json
import os
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from tqdm import tqdm

from mefn_jax.config import require_local
from mefn_jax.data import images
from mefn_jax.data.parsing import read_json, require
from mefn_jax.data.pipeline import pad_rows
from mefn_jax.errors import ConfigError, DataError, TrainingError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.evaluation.run import TrainedRun, define_run_flags, run_from_flags
from mefn_jax.features import Features
from mefn_jax.runtime.checkpoint import params_digest
from mefn_jax.runtime.cli import define_process_flags
from mefn_jax.runtime.console import print0, printable
from mefn_jax.runtime.formats import Format
from mefn_jax.runtime.lock import LOCK_FILE, hold_lock
from mefn_jax.runtime.multihost import initialize
from mefn_jax.runtime.sharding import batch_sharding, from_full_copy, replicated, round_up
from mefn_jax.runtime.storage import SAVE_SECONDS, write_atomic

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CHUNK = 1 << 15  # vectors searched at once
INDEX_FORMAT = Format(1, DataError, "make the index again")
# Keys of index.json.
METADATA_TYPES = {"checkpoint": dict, "folder": str, "images": int, "done": int, "skipped": list, "arrays": list}


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
        return Features(*(np.array(x[rows]) for x in (self.fragments, self.mask, self.pooled)))


def index_images(run: TrainedRun, folder, out) -> None:
    """Makes an index of a folder of images for a run (see `build_index`). Raises ConfigError for a model of regions."""
    require_local("--images", folder)
    require_local("--out", out)
    evaluator, params, checkpoint_id = load_model(run)
    if evaluator.config.image.arch == "regions":
        raise ConfigError("--images: this model takes precomputed regions, not images")
    build_index(evaluator, params, checkpoint_id, folder, out)


def load_model(run: TrainedRun):
    """Loads a trained model: the Evaluator, its parameters, and a dict that identifies the checkpoint."""
    evaluator, params, step_number = run.load()
    checkpoint_id = {"workdir": str(run.directory), "step": step_number, "parameters": params_digest(params)}
    return evaluator, params, checkpoint_id


def build_index(evaluator: Evaluator, params, checkpoint_id: dict, folder, out) -> None:
    """Encodes all images below `folder` into the directory `out`; continues an index that was stopped.

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
    names = list_images(folder)
    metadata = open_or_create(out, {"checkpoint": checkpoint_id, "folder": str(folder), "images": len(names)}, names)
    if metadata["done"] == len(names):
        print0(f"{out}: all images are encoded already")
        print_summary(out, folder, len(names), metadata["skipped"])
        return
    config, files = evaluator.config, None
    size = round_up(config.eval.batch_size, evaluator.mesh.size)
    bar = tqdm(total=len(names), initial=metadata["done"], desc="encoding", unit=" images", disable=None)
    last_saved, is_new = time.monotonic(), metadata["done"] == 0
    resize = images.resize_from_config(config.image)
    for first, pixels, undecodable in load_batches(folder, names, resize, size, metadata["done"], config):
        rows = slice(first, first + len(pixels))
        features = evaluator.encode_pixels(params, pad_rows(pixels, size), len(pixels))
        arrays = {"embeddings": evaluator.image_vectors(params, features)}
        if not evaluator.model.is_dual_encoder:
            arrays |= {"pooled": features.pooled, "fragments": features.fragments, "mask": features.mask}
        for x in arrays.values():
            require_finite(x, names[rows], "features are")
        files = files or {name: create_array(out / f"{name}.npy", len(names), x, is_new) for name, x in arrays.items()}
        metadata["arrays"] = list(files)
        for name, x in arrays.items():
            files[name][rows] = x
        metadata["done"] = rows.stop
        metadata["skipped"] += undecodable
        bar.update(len(pixels))
        if time.monotonic() - last_saved > SAVE_SECONDS or rows.stop == len(names):
            write_progress(out, metadata, files)
            last_saved = time.monotonic()
    bar.close()
    print_summary(out, folder, len(names), metadata["skipped"])


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


def list_images(folder: Path) -> list[str]:
    """Returns the images below a folder, sorted, as paths relative to it. Raises DataError if it has none."""
    if not folder.is_dir():
        raise DataError(f"--images={folder}: no such directory")
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    if not names:
        raise DataError(f"--images={folder}: no images in it ({', '.join(IMAGE_SUFFIXES)})")
    return names


def open_or_create(out: Path, metadata: dict, names: list[str]) -> dict:
    """Returns the metadata of the index at `out`, which it creates if there is none, with the progress so far.

    `metadata` describes the index that is wanted. Raises ConfigError if `out` holds another index or something else.
    """
    if not (out / "index.json").is_file():
        data = json.dumps(names, indent=0).encode()
        if out.exists() and not (out.is_dir() and all(is_leftover(path, data) for path in out.iterdir())):
            raise ConfigError(f"--out={out} is not empty and holds no index.json; choose another")
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_atomic(epath.Path(out / "images.json"), data)
        except OSError as e:
            raise ConfigError(f"--out={out}: cannot be written ({e.strerror})") from None
        metadata |= {"format": INDEX_FORMAT.number, "done": 0, "skipped": [], "arrays": []}
        write_progress(out, metadata, {})
        return metadata
    old_metadata, old_names = read_index(out)
    check_checkpoint(out, old_metadata, metadata["checkpoint"])
    old_folder = old_metadata["folder"]
    if old_folder != metadata["folder"]:
        raise ConfigError(f"--out={out} is of other images, of {old_folder}; choose another, or remove it")
    if old_names != names:
        more, fewer = len(set(names) - set(old_names)), len(set(old_names) - set(names))
        raise ConfigError(
            f"--out={out} is of other images: {old_folder} has {more} more and {fewer} fewer than when the index was "
            "started; choose another, or remove it"
        )
    return old_metadata


def is_leftover(path: Path, data: bytes) -> bool:
    """Returns whether a file was left by a process that was killed before it wrote `index.json`.

    Such a file is half-written, or is `images.json` with the names, `data`. The lock is none of the index's files.
    """
    is_half_written = path.name in (".images.json.new", ".index.json.new", LOCK_FILE)
    return is_half_written or (path.name == "images.json" and path.is_file() and path.read_bytes() == data)


def read_index(path: Path) -> tuple[dict, list[str]]:
    """Reads the metadata and the names: `index.json` and `images.json`. Raises DataError if they are damaged, or
    of a format that cannot be read."""
    metadata, names = read_json(path / "index.json"), read_json(path / "images.json")
    metadata = INDEX_FORMAT.upgrade(metadata, f"{path}/index.json")
    for key, kind in METADATA_TYPES.items():
        require(metadata, key, kind, f"{path}/index.json")
    if not isinstance(names, list) or len(names) != metadata["images"]:
        raise DataError(f"{path}/images.json: is not a list of {metadata['images']} names; make the index again")
    return metadata, names


def check_checkpoint(out, metadata: dict, checkpoint_id: dict) -> None:
    """Raises ConfigError if an index was made by another checkpoint."""
    index_id = metadata["checkpoint"]
    if index_id.get("parameters") == checkpoint_id["parameters"]:
        return
    maker, other = (f"step {x.get('step')} of {x.get('workdir')}" for x in (index_id, checkpoint_id))
    reason = (
        "with other parameters (trained again since, or --ema differs)" if maker == other else f"which is not {other}"
    )
    raise ConfigError(f"the index {out} was made by {maker}, {reason}: give that checkpoint, or make the index again")


def load_batches(folder: Path, names: list[str], resize, size: int, start: int, config):
    """Yields `(first, pixels uint8 (n, H, W, 3), undecodable names)` for batches of images from row `start` on.

    Undecodable images are black.
    """

    def load_batch(first):
        number = min(size, len(names) - first)
        pixels, undecodable = np.zeros((number, resize.size, resize.size, 3), np.uint8), []
        for k, name in enumerate(names[first : first + size]):
            try:
                pixels[k] = images.decode((folder / name).read_bytes(), resize, name)
            except (DataError, OSError):
                undecodable.append(name)
        return first, pixels, undecodable

    options = grain.ReadOptions(num_threads=config.data.threads, prefetch_buffer_size=2 * config.data.threads)
    yield from grain.MapDataset.range(start, len(names), size).map(load_batch).to_iter_dataset(options)


def create_array(path: Path, rows: int, first: np.ndarray, is_new: bool) -> np.ndarray:
    """Opens the array of a file for writing, mapped into memory; if `is_new`, creates it.

    A new array has `rows` rows, with the shape and dtype of those of `first`. Raises ConfigError if the disk has no
    room for it: without this check, a later write would kill the process by a signal.
    """
    if not is_new:
        return open_array(path, rows, "r+")
    array = np.lib.format.open_memmap(path, "w+", first.dtype, (rows, *first.shape[1:]))
    if not hasattr(os, "posix_fallocate"):  # macOS
        return array
    try:
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
    except OSError as e:
        path.unlink()
        size = array.nbytes / 1e9
        raise ConfigError(
            f"--out: {path} needs {size:.1f} GB, which the disk cannot hold ({e.strerror}); choose another disk"
        ) from None
    return array


def open_array(path: Path, rows: int, mode: str) -> np.ndarray:
    """Opens the array of a file, mapped into memory. Raises DataError if it is damaged."""
    try:
        array = np.load(path, mmap_mode=mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise DataError(f"{path}: cannot be read as an array ({e}); make the index again") from None
    shape = getattr(array, "shape", "an archive")
    if shape[:1] != (rows,):
        raise DataError(f"{path}: expected a row for each of {rows} images, found {shape}; make the index again")
    return array


def write_progress(out: Path, metadata: dict, arrays: dict) -> None:
    """Writes the metadata, with the progress so far, after the arrays are on disk."""
    for array in arrays.values():
        array.flush()
    write_atomic(epath.Path(out / "index.json"), json.dumps(metadata, indent=1).encode())


def open_index(path, checkpoint_id: dict | None = None) -> Index:
    """Opens an index.

    Raises ConfigError if it is not complete, or made by another checkpoint than `checkpoint_id`; DataError if it is
    damaged or none of its images could be decoded.
    """
    path = Path(path)
    if not (path / "index.json").is_file():
        raise ConfigError(f"--index={path}: no index; make one with python eval.py index --images=FOLDER --out={path}")
    metadata, names = read_index(path)
    if checkpoint_id:
        check_checkpoint(path, metadata, checkpoint_id)
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
    return Index(Path(metadata["folder"]), names, readable, **arrays)


def search_embeddings(vectors: np.ndarray, query: np.ndarray, k: int, mesh, readable: np.ndarray | None = None):
    """Finds the k vectors whose inner product with `query (D,)` is largest, exactly.

    `vectors (I, D)` may be mapped from disk: they are searched a chunk at a time, split over the devices. `readable`
    bool `(I,)` leaves vectors out. Returns positions int64 `(k,)` and products float32 `(k,)`, best first, equal
    products by position. Raises TrainingError for a product that is not finite.
    """
    number = len(vectors)
    k = min(k, number if readable is None else int(readable.sum()))
    size = round_up(min(CHUNK, number), mesh.size)
    query = from_full_copy(replicated(mesh), np.asarray(query, np.float32))
    positions, products = np.empty(0, np.int64), np.empty(0, np.float32)
    for first in range(0, number, size):
        chunk = vectors[first : first + size]
        mask = np.arange(size) < len(chunk)  # without padding and unreadable images
        if readable is not None:
            mask[: len(chunk)] &= readable[first : first + size]
        rows = from_full_copy(batch_sharding(mesh), (pad_rows(np.asarray(chunk, np.float32), size), mask))
        chunk_products, chunk_positions, is_finite = map(np.asarray, _find_top_k(query, *rows, k=min(k, size)))
        if not is_finite:
            raise TrainingError(
                "the embedding of the query, or one of the index, is not finite; the parameters are not either"
            )
        keep = chunk_products > -np.inf
        positions = np.concatenate([positions, first + chunk_positions[keep]])
        products = np.concatenate([products, chunk_products[keep]])
        order = np.lexsort((positions, -products))[:k]
        positions, products = positions[order], products[order]
    return positions, products


@functools.partial(jax.jit, static_argnames="k")
def _find_top_k(query, vectors, mask, *, k: int):
    products = jnp.matmul(vectors, query, precision=jax.lax.Precision.HIGHEST)
    is_finite = jnp.all(jnp.isfinite(products) | ~mask)
    return *jax.lax.top_k(jnp.where(mask, products, -jnp.inf), k), is_finite


def define_flags() -> None:
    """Defines the flags of the command."""
    define_run_flags()
    flags.DEFINE_string("images", None, "Folder of images; those in its subfolders are taken too.", required=True)
    flags.DEFINE_string("out", None, "Directory of the index.", required=True)
    define_process_flags()


def main() -> None:
    """Runs the command."""
    initialize()
    index_images(run_from_flags(), flags.FLAGS.images, flags.FLAGS.out)
