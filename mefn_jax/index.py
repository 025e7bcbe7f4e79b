"""An index: a folder of images, encoded once, to be searched by captions (DESIGN.md 8).

`INDEX/` holds, a row an image, `images.txt` (names under the folder), `coarse.npy` float32 (I, D), the unit vectors of
the first stage, and, where the matcher scores fragments, `pooled.npy` (I, D), `fragments.npy` (I, N, D) and `mask.npy`
bool (I, N). All are plain NumPy files, which searching maps into memory. `index.json` says what made them, how many
rows are written, and which images could not be read.
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
from mefn_jax.data.files import read_json, read_text
from mefn_jax.data.pipeline import pad_rows
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluator import Evaluator
from mefn_jax.logs import say
from mefn_jax.matching.features import Features
from mefn_jax.remote import write_whole
from mefn_jax.sharding import by_rows, put_whole, replicated

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SAVE_SECONDS = 10.0  # between two notes of how far it has come
CHUNK = 1 << 15  # vectors searched at once


@dataclasses.dataclass(frozen=True)
class Index:
    """An opened index of I images; arrays are mapped into memory. `readable` bool `(I,)`; `pooled`, `fragments` and
    `mask` are None where `coarse` is all that the matcher scores."""

    folder: Path
    names: list[str]
    readable: np.ndarray
    coarse: np.ndarray
    pooled: np.ndarray | None = None
    fragments: np.ndarray | None = None
    mask: np.ndarray | None = None

    def features(self, rows: np.ndarray) -> Features:
        """Features of some of the images, read from the files."""
        return Features(*(np.array(x[rows]) for x in (self.fragments, self.mask, self.pooled)))


def build(evaluator: Evaluator, params, made_by: dict, folder, out) -> None:
    """Encodes all images below `folder` into the directory `out`; the same command goes on where it was stopped.

    `made_by` says which checkpoint this is. An image that cannot be decoded is listed and left out. Raises DataError
    for a folder without images, ConfigError for an `out` that holds something else.
    """
    if jax.process_count() > 1:
        raise ConfigError("--index_images: an index is made by one process, which may have several devices")
    folder, out = Path(folder).resolve(), Path(out)
    names = listed(folder)
    facts = begun(out, {"checkpoint": made_by, "folder": str(folder), "images": len(names)}, names)
    if facts["done"] == len(names):
        say(f"{out}: all {len(names)} images are encoded already")
        return
    config, arrays = evaluator.config, None
    size = -(-config.eval.batch_size // evaluator.mesh.size) * evaluator.mesh.size
    bar = tqdm(total=len(names), initial=facts["done"], desc="encoding", unit=" images", disable=None)
    saved, new = time.monotonic(), facts["done"] == 0
    for first, pixels, bad in batches(folder, names, images.resize_of(config.image), size, facts["done"], config):
        rows = slice(first, first + len(pixels))
        encoded = evaluator.of_images(params, pad_rows(pixels, size), len(pixels))
        found = {"coarse": evaluator.coarse(params, encoded)}
        if not evaluator.model.coarse_is_score:
            found |= {"pooled": encoded.pooled, "fragments": encoded.fragments, "mask": encoded.mask}
        arrays = arrays or {name: array_of(out / f"{name}.npy", len(names), x, new) for name, x in found.items()}
        for name, x in found.items():
            arrays[name][rows] = x
        facts["done"] = rows.stop
        facts["skipped"] += bad
        bar.update(len(pixels))
        if time.monotonic() - saved > SAVE_SECONDS or rows.stop == len(names):
            noted(out, facts, arrays)
            saved = time.monotonic()
    bar.close()
    if facts["skipped"]:
        shown = ", ".join(facts["skipped"][:5]) + (", ..." if len(facts["skipped"]) > 5 else "")
        say(f"left out {len(facts['skipped'])} images that cannot be decoded: {shown} (all in {out}/index.json)")
    say(f"wrote {out}: {len(names) - len(facts['skipped'])} images")


def listed(folder: Path) -> list[str]:
    """The images below a folder, sorted, as paths relative to it. Raises DataError if there are none."""
    if not folder.is_dir():
        raise DataError(f"--index_images={folder}: no such directory")
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    if not names:
        raise DataError(f"--index_images={folder}: no images in it ({', '.join(SUFFIXES)})")
    if any("\n" in name for name in names):
        raise DataError(f"--index_images={folder}: a file's name has a line break in it; rename it")
    return names


def begun(out: Path, facts: dict, names: list[str]) -> dict:
    """The facts of an index, as far as it has come. Raises ConfigError if `out` is that of something else."""
    path = out / "index.json"
    if not path.is_file():
        if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - {"images.txt"}):
            raise ConfigError(f"--index={out} is not empty and holds no index.json; choose another")
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_whole(epath.Path(out / "images.txt"), "".join(f"{name}\n" for name in names).encode())
        except OSError as e:
            raise ConfigError(f"--index={out}: cannot be written ({e.strerror})") from None
        facts |= {"done": 0, "skipped": []}
        noted(out, facts, {})
        return facts
    old = read_json(path)
    check_checkpoint(out, old, facts["checkpoint"])
    if old["folder"] != facts["folder"] or read_text(out / "images.txt").splitlines() != names:
        raise ConfigError(f"--index={out} is of other images, of {old['folder']}; choose another, or remove it")
    return old


def check_checkpoint(out, facts: dict, made_by: dict) -> None:
    """Raises ConfigError if an index was not made by this checkpoint."""
    made = facts["checkpoint"]
    if made["parameters"] != made_by["parameters"]:
        raise ConfigError(
            f"--index={out} was made by step {made['step']} of {made['workdir']}, which is not step {made_by['step']} "
            f"of {made_by['workdir']}: give that checkpoint, or make the index again"
        )


def batches(folder: Path, names: list[str], resize, size: int, start: int, config):
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


def array_of(path: Path, rows: int, first: np.ndarray, new: bool) -> np.ndarray:
    """The array of a file, mapped into memory to be written; if `new`, made for so many rows like `first`'s. Raises
    ConfigError if there is no room for it: later it would be a signal that kills the process."""
    if not new:
        return np.load(path, mmap_mode="r+")
    array = np.lib.format.open_memmap(path, "w+", first.dtype, (rows, *first.shape[1:]))
    try:
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
    except OSError as e:
        path.unlink()
        size = array.nbytes / 1e9
        raise ConfigError(f"--index: {path} takes {size:.1f} GB, for which there is no room ({e.strerror})") from None
    return array


def noted(out: Path, facts: dict, arrays: dict) -> None:
    """Notes how far it has come, once that is on disk."""
    for array in arrays.values():
        array.flush()
    write_whole(epath.Path(out / "index.json"), json.dumps(facts, indent=1).encode())


def open_index(path, made_by: dict | None = None) -> Index:
    """Opens an index. Raises ConfigError if it is not complete, or made by another checkpoint than `made_by`."""
    path = Path(path)
    if not (path / "index.json").is_file():
        raise ConfigError(f"--index={path}: no index; make one with --index_images=DIR --index={path}")
    facts = read_json(path / "index.json")
    if made_by:
        check_checkpoint(path, facts, made_by)
    if facts["done"] < facts["images"]:
        raise ConfigError(
            f"--index={path}: {facts['done']} of {facts['images']} images are encoded; run --index_images again"
        )
    names = read_text(path / "images.txt").splitlines()
    skipped = set(facts["skipped"])
    readable = np.array([name not in skipped for name in names])
    arrays = {
        name: np.load(path / f"{name}.npy", mmap_mode="r")
        for name in ("coarse", "pooled", "fragments", "mask")
        if (path / f"{name}.npy").is_file()
    }
    return Index(Path(facts["folder"]), names, readable, **arrays)


def search(vectors: np.ndarray, query: np.ndarray, k: int, mesh, readable: np.ndarray | None = None):
    """The k vectors `(I, D)`, perhaps on disk, whose product with `query (D,)` is largest: positions int64 `(k,)` and
    products float32 `(k,)`, best first, equal ones by position. Exact; spread over the devices, a chunk at a time."""
    number = len(vectors)
    k = min(k, number if readable is None else int(readable.sum()))
    size = -(-min(CHUNK, number) // mesh.size) * mesh.size
    query = put_whole(replicated(mesh), np.asarray(query, np.float32))
    positions, products = np.empty(0, np.int64), np.empty(0, np.float32)
    for first in range(0, number, size):
        part = vectors[first : first + size]
        there = np.arange(size) < len(part)
        if readable is not None:
            there[: len(part)] &= readable[first : first + size]
        rows = put_whole(by_rows(mesh), (pad_rows(np.asarray(part, np.float32), size), there))
        best, at = map(np.asarray, _best(query, *rows, k=min(k, size)))
        keep = best > -np.inf
        positions = np.concatenate([positions, first + at[keep]])
        products = np.concatenate([products, best[keep]])
        order = np.lexsort((positions, -products))[:k]
        positions, products = positions[order], products[order]
    return positions, products


@functools.partial(jax.jit, static_argnames="k")
def _best(query, vectors, there, *, k: int):
    products = jnp.matmul(vectors, query, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.top_k(jnp.where(there, products, -jnp.inf), k)
