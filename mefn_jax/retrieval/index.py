"""An index: a folder of images, encoded once, to be searched by captions (DESIGN.md 8).

`INDEX/` holds, a row an image, `images.json` (names under the folder), `embeddings.npy` float32 (I, D), the unit vectors of
the first stage, and, where the matcher scores fragments, `pooled.npy` (I, D), `fragments.npy` (I, N, D) and `mask.npy`
bool (I, N). All arrays are plain NumPy files, which searching maps into memory. `index.json` says what made them, which
there are, how many rows are written, and which images could not be read.
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
from etils import epath
from tqdm import tqdm

from mefn_jax.data import images
from mefn_jax.data.parsing import read_json, require
from mefn_jax.data.pipeline import pad_rows
from mefn_jax.errors import ConfigError, DataError, TrainingError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.features import Features
from mefn_jax.runtime.console import print0, printable
from mefn_jax.runtime.sharding import batch_sharding, from_full_copy, replicated, round_up
from mefn_jax.runtime.storage import SAVE_SECONDS, write_atomic

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CHUNK = 1 << 15  # vectors searched at once
METADATA_TYPES = {
    "checkpoint": dict,
    "folder": str,
    "images": int,
    "done": int,
    "skipped": list,
    "arrays": list,
}  # index.json


@dataclasses.dataclass(frozen=True)
class Index:
    """An opened index of I images; arrays are mapped into memory. `readable` bool `(I,)`; `pooled`, `fragments` and
    `mask` are None where `embeddings` are all that the matcher scores."""

    folder: Path
    names: list[str]
    readable: np.ndarray
    embeddings: np.ndarray
    pooled: np.ndarray | None = None
    fragments: np.ndarray | None = None
    mask: np.ndarray | None = None

    def features(self, rows: np.ndarray) -> Features:
        """Features of some of the images, read from the files."""
        return Features(*(np.array(x[rows]) for x in (self.fragments, self.mask, self.pooled)))


def build_index(evaluator: Evaluator, params, made_by: dict, folder, out) -> None:
    """Encodes all images below `folder` into the directory `out`; the same command goes on where it was stopped.

    `made_by` says which checkpoint this is. An image that cannot be decoded is listed and left out. Raises DataError
    for a folder without images, ConfigError for an `out` that holds something else.
    """
    if jax.process_count() > 1:
        raise ConfigError("--index_images: an index is made by one process, which may have several devices")
    folder, out = Path(folder).resolve(), Path(out)
    names = list_images(folder)
    facts = open_or_create(out, {"checkpoint": made_by, "folder": str(folder), "images": len(names)}, names)
    if facts["done"] == len(names):
        print0(f"{out}: all images are encoded already")
        print_summary(out, folder, len(names), facts["skipped"])
        return
    config, arrays = evaluator.config, None
    size = round_up(config.eval.batch_size, evaluator.mesh.size)
    bar = tqdm(total=len(names), initial=facts["done"], desc="encoding", unit=" images", disable=None)
    saved, new = time.monotonic(), facts["done"] == 0
    for first, pixels, bad in load_batches(
        folder, names, images.resize_from_config(config.image), size, facts["done"], config
    ):
        rows = slice(first, first + len(pixels))
        encoded = evaluator.encode_pixels(params, pad_rows(pixels, size), len(pixels))
        found = {"embeddings": evaluator.embed(params, encoded)}
        if not evaluator.model.is_dual_encoder:
            found |= {"pooled": encoded.pooled, "fragments": encoded.fragments, "mask": encoded.mask}
        for x in found.values():
            require_finite(x, names[rows], "features are")
        arrays = arrays or {name: create_array(out / f"{name}.npy", len(names), x, new) for name, x in found.items()}
        facts["arrays"] = list(arrays)
        for name, x in found.items():
            arrays[name][rows] = x
        facts["done"] = rows.stop
        facts["skipped"] += bad
        bar.update(len(pixels))
        if time.monotonic() - saved > SAVE_SECONDS or rows.stop == len(names):
            write_progress(out, facts, arrays)
            saved = time.monotonic()
    bar.close()
    print_summary(out, folder, len(names), facts["skipped"])


def print_summary(out: Path, folder: Path, number: int, skipped: list[str]) -> None:
    """Says what there is and what was left out. Raises DataError if that is all."""
    if skipped:
        shown = ", ".join(map(printable, skipped[:5])) + (", ..." if len(skipped) > 5 else "")
        print0(f"left out {len(skipped)} images that cannot be decoded: {shown} (all in {out}/index.json)")
    if len(skipped) == number:
        raise DataError(f"--index_images={folder}: no image in it can be decoded")
    print0(f"{out} has {number - len(skipped)} images")


def require_finite(values: np.ndarray, names: list[str], what: str = "score is") -> None:
    """Raises TrainingError, naming the first, if `values (n, ...)`, a row for each name, are not all finite."""
    bad = ~np.isfinite(values.reshape(len(values), -1)).all(1)
    if bad.any():
        name = printable(names[np.argmax(bad)])
        raise TrainingError(f"{name}: its {what} not finite; the parameters are not, or the index is damaged")


def list_images(folder: Path) -> list[str]:
    """The images below a folder, sorted, as paths relative to it. Raises DataError if there are none."""
    if not folder.is_dir():
        raise DataError(f"--index_images={folder}: no such directory")
    found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    if not names:
        raise DataError(f"--index_images={folder}: no images in it ({', '.join(IMAGE_SUFFIXES)})")
    return names


def open_or_create(out: Path, facts: dict, names: list[str]) -> dict:
    """The facts of an index, as far as it has come. Raises ConfigError if `out` is that of something else."""
    if not (out / "index.json").is_file():
        data = json.dumps(names, indent=0).encode()
        if out.exists() and not (out.is_dir() and all(is_leftover(path, data) for path in out.iterdir())):
            raise ConfigError(f"--index={out} is not empty and holds no index.json; choose another")
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_atomic(epath.Path(out / "images.json"), data)
        except OSError as e:
            raise ConfigError(f"--index={out}: cannot be written ({e.strerror})") from None
        facts |= {"done": 0, "skipped": [], "arrays": []}
        write_progress(out, facts, {})
        return facts
    old, before = read_index(out)
    check_checkpoint(out, old, facts["checkpoint"])
    if old["folder"] != facts["folder"]:
        raise ConfigError(f"--index={out} is of other images, of {old['folder']}; choose another, or remove it")
    if before != names:
        more, fewer = len(set(names) - set(before)), len(set(before) - set(names))
        raise ConfigError(
            f"--index={out} is of other images: {old['folder']} has {more} more and {fewer} fewer than when it was "
            "begun; choose another, or remove it"
        )
    return old


def is_leftover(path: Path, data: bytes) -> bool:
    """Whether a file is what a process leaves that was killed before `index.json` was there: a half-written one, or
    the names, `data`."""
    half = path.name in (".images.json.new", ".index.json.new")
    return half or (path.name == "images.json" and path.is_file() and path.read_bytes() == data)


def read_index(path: Path) -> tuple[dict, list[str]]:
    """What `index.json` and `images.json` say. Raises DataError if they are damaged."""
    facts, names = read_json(path / "index.json"), read_json(path / "images.json")
    for key, kind in METADATA_TYPES.items():
        require(facts, key, kind, f"{path}/index.json")
    if not isinstance(names, list) or len(names) != facts["images"]:
        raise DataError(f"{path}/images.json: is not a list of {facts['images']} names; make the index again")
    return facts, names


def check_checkpoint(out, facts: dict, made_by: dict) -> None:
    """Raises ConfigError if an index was not made by this checkpoint."""
    made = facts["checkpoint"]
    if made.get("parameters") == made_by["parameters"]:
        return
    one, other = (f"step {x.get('step')} of {x.get('workdir')}" for x in (made, made_by))
    but = "with other parameters (trained anew since, or without --ema)" if one == other else f"which is not {other}"
    raise ConfigError(f"--index={out} was made by {one}, {but}: give that checkpoint, or make the index again")


def load_batches(folder: Path, names: list[str], resize, size: int, start: int, config):
    """`(first, uint8 (n, H, W, 3), names that cannot be decoded)` from row `start` on; these are black."""

    def load(first):
        pixels, bad = np.zeros((min(size, len(names) - first), resize.size, resize.size, 3), np.uint8), []
        for k, name in enumerate(names[first : first + size]):
            try:
                pixels[k] = images.decode((folder / name).read_bytes(), resize, name)
            except (DataError, OSError):
                bad.append(name)
        return first, pixels, bad

    read = grain.ReadOptions(num_threads=config.data.threads, prefetch_buffer_size=2 * config.data.threads)
    yield from grain.MapDataset.range(start, len(names), size).map(load).to_iter_dataset(read)


def create_array(path: Path, rows: int, first: np.ndarray, new: bool) -> np.ndarray:
    """The array of a file, mapped into memory to be written; if `new`, made for so many rows like `first`'s. Raises
    ConfigError if there is no room for it: later it would be a signal that kills the process."""
    if not new:
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
        raise ConfigError(f"--index: {path} takes {size:.1f} GB, for which there is no room ({e.strerror})") from None
    return array


def open_array(path: Path, rows: int, mode: str) -> np.ndarray:
    """The array of a file, mapped into memory. Raises DataError if it is damaged."""
    try:
        array = np.load(path, mmap_mode=mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise DataError(f"{path}: cannot be read as an array ({e}); make the index again") from None
    shape = getattr(array, "shape", "an archive")
    if shape[:1] != (rows,):
        raise DataError(f"{path}: expected a row for each of {rows} images, found {shape}; make the index again")
    return array


def write_progress(out: Path, facts: dict, arrays: dict) -> None:
    """Notes how far it has come, once that is on disk."""
    for array in arrays.values():
        array.flush()
    write_atomic(epath.Path(out / "index.json"), json.dumps(facts, indent=1).encode())


def open_index(path, made_by: dict | None = None) -> Index:
    """Opens an index. Raises ConfigError if it is not complete, or made by another checkpoint than `made_by`, and
    DataError if it is damaged or has no image."""
    path = Path(path)
    if not (path / "index.json").is_file():
        raise ConfigError(f"--index={path}: no index; make one with --index_images=DIR --index={path}")
    facts, names = read_index(path)
    if made_by:
        check_checkpoint(path, facts, made_by)
    if facts["done"] < facts["images"]:
        raise ConfigError(
            f"--index={path}: {facts['done']} of {facts['images']} images are encoded; run --index_images again"
        )
    skipped = set(facts["skipped"])
    readable = np.array([name not in skipped for name in names])
    if not readable.any():
        raise DataError(f"--index={path}: none of its images could be decoded")
    arrays = {name: open_array(path / f"{name}.npy", len(names), "r") for name in facts["arrays"]}
    return Index(Path(facts["folder"]), names, readable, **arrays)


def search_embeddings(vectors: np.ndarray, query: np.ndarray, k: int, mesh, readable: np.ndarray | None = None):
    """The k vectors `(I, D)`, perhaps on disk, whose product with `query (D,)` is largest: positions int64 `(k,)` and
    products float32 `(k,)`, best first, equal ones by position. Exact; spread over the devices, a chunk at a time.
    Raises TrainingError for a product that is not finite."""
    number = len(vectors)
    k = min(k, number if readable is None else int(readable.sum()))
    size = round_up(min(CHUNK, number), mesh.size)
    query = from_full_copy(replicated(mesh), np.asarray(query, np.float32))
    positions, products = np.empty(0, np.int64), np.empty(0, np.float32)
    for first in range(0, number, size):
        part = vectors[first : first + size]
        there = np.arange(size) < len(part)
        if readable is not None:
            there[: len(part)] &= readable[first : first + size]
        rows = from_full_copy(batch_sharding(mesh), (pad_rows(np.asarray(part, np.float32), size), there))
        best, at, sound = map(np.asarray, _best(query, *rows, k=min(k, size)))
        if not sound:
            raise TrainingError("the vector of the query, or one of the index, is not finite; the parameters are not")
        keep = best > -np.inf
        positions = np.concatenate([positions, first + at[keep]])
        products = np.concatenate([products, best[keep]])
        order = np.lexsort((positions, -products))[:k]
        positions, products = positions[order], products[order]
    return positions, products


@functools.partial(jax.jit, static_argnames="k")
def _best(query, vectors, there, *, k: int):
    products = jnp.matmul(vectors, query, precision=jax.lax.Precision.HIGHEST)
    sound = jnp.all(jnp.isfinite(products) | ~there)
    return *jax.lax.top_k(jnp.where(there, products, -jnp.inf), k), sound
