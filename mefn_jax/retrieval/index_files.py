"""Files of an index: how they are read, how they grow while images are encoded, and how an update replaces them.

`files.npy` int64 `(I, 3)` has the size and the time of each image file when it was encoded, and its state: 0 until
then, ENCODED, or UNDECODABLE. An update of an index is an index itself, in `INDEX/update-K/`: rows of unchanged images
are copied into it, and when it is complete, its files replace those of the index (`commit_update`). I images.
"""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
from etils import epath

from mefn_jax.data.parsing import read_json, require
from mefn_jax.errors import ConfigError, DataError, reason
from mefn_jax.retrieval.image_folder import ImageFolder
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.formats import Format
from mefn_jax.runtime.lock import LOCK_FILE
from mefn_jax.runtime.outputs import check_output_directory
from mefn_jax.runtime.storage import write_atomic

COPIED_BYTES = 1 << 28  # of an array that are copied at once
# Format 1 kept no sizes and times of the images: none of its rows is known to be up to date.
INDEX_FORMAT = Format(2, DataError, "make the index again", {1: dict})
# Keys of index.json.
METADATA_TYPES = {"checkpoint": dict, "folder": str, "images": int, "done": int, "skipped": list, "arrays": list}
# Arrays with a row for each image: the number of axes, and the kind of the values.
ARRAYS = {"embeddings": (2, "f"), "pooled": (2, "f"), "fragments": (3, "f"), "mask": (2, "b")}
ENCODED, UNDECODABLE = 1, 2  # states in files.npy
COMMIT_FILE = "commit.json"  # exists while the files of a complete update replace those of the index


class GrowingIndex:
    """An index that is being made, or that may have to be brought up to date.

    Attributes:
        path: its directory.
        names: the names of its images.
        checkpoint: identifies the checkpoint.
        folder: the folder of the images.
        states: int64 `(I, 3)`, the content of `files.npy`.
        arrays: the arrays by name, mapped into memory; empty until the first rows are known.
        is_complete: whether it could be searched when it was opened.
    """

    def __init__(self, path: Path, names: list[str], checkpoint: dict, folder: str, is_complete: bool = False):
        self.path, self.names, self.checkpoint, self.folder = path, names, checkpoint, folder
        self.is_complete = is_complete
        self.states, self.arrays = np.zeros((len(names), 3), np.int64), {}

    @property
    def skipped(self) -> list[str]:
        """Returns the names of the images that cannot be decoded."""
        return [self.names[k] for k in np.flatnonzero(self.states[:, 2] == UNDECODABLE)]

    @property
    def done(self) -> int:
        """Returns the number of rows that are written."""
        return int(np.count_nonzero(self.states[:, 2]))

    def find_missing(self, found: ImageFolder) -> np.ndarray:
        """Returns the positions of the images that are not encoded as they are in the folder now. The index and the
        folder have the same names."""
        return np.flatnonzero((self.states[:, 2] == 0) | np.any(self.states[:, :2] != found.files, 1))

    def write_rows(self, rows: np.ndarray, features: dict[str, np.ndarray]) -> None:
        """Writes rows of the arrays; creates arrays that do not exist."""
        for name, x in features.items():
            if name not in self.arrays:
                self.arrays[name] = create_array(self.path / f"{name}.npy", len(self.names), x)
            self.arrays[name][rows] = x

    def copy_rows(self, source: "GrowingIndex", found: ImageFolder) -> int:
        """Copies the rows of unchanged images that this index lacks from another one, and returns their number."""
        positions = {name: k for k, name in enumerate(source.names)}
        old_rows = np.array([positions.get(name, -1) for name in self.names])
        is_same = (old_rows >= 0) & (source.states[old_rows, 2] > 0) & (self.states[:, 2] == 0)
        rows = np.flatnonzero(is_same & np.all(source.states[old_rows, :2] == found.files, 1))
        for name, array in source.arrays.items():
            size = max(1, COPIED_BYTES // max(1, array[:1].nbytes))
            for first in range(0, len(rows), size):
                part = rows[first : first + size]
                self.write_rows(part, {name: np.asarray(array[old_rows[part]])})
        self.states[rows] = source.states[old_rows[rows]]
        return len(rows)

    def save(self) -> None:
        """Writes the progress. The arrays go first, so that no row counts as written that is not on disk."""
        for array in self.arrays.values():
            array.flush()
        states = io.BytesIO()
        np.save(states, self.states)
        metadata = {
            "checkpoint": self.checkpoint,
            "folder": self.folder,
            "images": len(self.names),
            "format": INDEX_FORMAT.number,
            "done": self.done,
            "skipped": self.skipped,
            "arrays": list(self.arrays),
        }
        write_atomic(epath.Path(self.path / "files.npy"), states.getvalue())
        write_atomic(epath.Path(self.path / "index.json"), json.dumps(metadata, indent=1).encode())


def open_growing(out: Path, checkpoint_id: dict, found: ImageFolder) -> GrowingIndex:
    """Returns the index that is to be completed: the one at `out`, which is created if there is none, or an update.

    An update is needed if the index has other images, or is complete and images have changed. What is up to date in the
    index and in earlier updates that were stopped is copied into it. Raises ConfigError if `out` holds an index of
    another checkpoint or folder.
    """
    if not (out / "index.json").is_file():
        return create_growing(out, checkpoint_id, found)
    finish_commit(out)
    index = reopen_growing(out)
    check_checkpoint(out, index.checkpoint, checkpoint_id)
    if index.folder != str(found.folder):
        raise ConfigError(f"--out={out} is of other images, of {index.folder}; choose another, or remove it")
    updates = find_updates(out, checkpoint_id)
    may_grow = not index.is_complete and not updates
    if index.names == found.names and (may_grow or not len(index.find_missing(found))):
        remove_updates(out)
        return index
    if updates and updates[-1].names == found.names:
        return updates[-1]
    numbers = [int(update.path.name.removeprefix("update-")) for update in updates]
    update = create_growing(out / f"update-{max(numbers, default=0) + 1}", checkpoint_id, found)
    num_copied = sum(update.copy_rows(source, found) for source in (index, *updates))
    update.save()
    remove_updates(out, kept=update.path)
    gone = len(set(index.names) - set(found.names))
    print0(
        f"{out}: {num_copied} images are as they were, {len(found.names) - num_copied} are new or have changed, "
        f"{gone} are gone"
    )
    return update


def create_growing(path: Path, checkpoint_id: dict, found: ImageFolder) -> GrowingIndex:
    """Creates an index without rows. Raises ConfigError if that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(epath.Path(path / "images.json"), encode_names(found.names))
        growing = GrowingIndex(path, found.names, checkpoint_id, str(found.folder))
        if path.name.startswith("update-"):
            return growing  # saved when the rows are copied; without index.json it is not yet an update
        growing.save()
    except OSError as e:
        raise ConfigError(f"--out={path}: cannot be written ({e.strerror})") from None
    return growing


def reopen_growing(path: Path) -> GrowingIndex:
    """Opens an index for writing. Raises DataError if it is damaged."""
    metadata, names = read_index(path)
    is_complete = metadata["done"] == len(names)
    growing = GrowingIndex(path, names, metadata["checkpoint"], metadata["folder"], is_complete)
    if (path / "files.npy").is_file():
        growing.states = np.array(open_array(path / "files.npy", len(names), "r"))
        if growing.states.shape != (len(names), 3) or growing.states.dtype != np.int64:
            raise DataError(f"{path}/files.npy: expected int64 ({len(names)}, 3); make the index again")
    if growing.done:
        growing.arrays = {name: open_array(path / f"{name}.npy", len(names), "r+") for name in metadata["arrays"]}
    return growing


def find_updates(out: Path, checkpoint_id: dict) -> list[GrowingIndex]:
    """Returns the updates of an index that were stopped, the oldest first; removes those that cannot be used."""
    updates = []
    for path in out.glob("update-*"):
        try:
            update = reopen_growing(path)
            check_checkpoint(path, update.checkpoint, checkpoint_id)
            updates.append((int(path.name.removeprefix("update-")), update))
        except (ConfigError, DataError, ValueError):
            shutil.rmtree(path)
    return [update for _, update in sorted(updates, key=lambda numbered: numbered[0])]


def remove_updates(out: Path, kept: Path | None = None) -> None:
    """Removes all updates of an index but `kept`."""
    for path in out.glob("update-*"):
        if path != kept:
            shutil.rmtree(path)


def commit_update(out: Path, update: Path) -> None:
    """Replaces the files of an index with those of a complete update of it."""
    write_atomic(epath.Path(out / COMMIT_FILE), json.dumps({"update": update.name}).encode())
    finish_commit(out)


def finish_commit(out: Path) -> None:
    """Finishes the replacement of an index's files that `commit_update` has begun, if it has. It can be stopped at any
    time, and the next call goes on. Raises DataError if COMMIT_FILE is damaged."""
    commit = out / COMMIT_FILE
    if not commit.is_file():
        return
    name = require(read_json(commit), "update", str, str(commit))
    if Path(name).name != name or not name.startswith("update-"):
        raise DataError(f"{commit}: {name[:60]!r} is no update; make the index again")
    files = (out / name).iterdir() if (out / name).is_dir() else ()
    for path in sorted(files, key=lambda path: path.name == "index.json"):  # index.json last
        os.replace(path, out / path.name)
    commit.unlink()
    remove_updates(out)


def check_index_directory(out: Path, names: list[str] | None = None) -> None:
    """Raises ConfigError if a directory can hold no index: it cannot be written, or holds something else.

    `names` are the images of an index that a process may have left that was killed at once; None for any.
    """
    check_output_directory("--out", out, {})
    if not out.exists() or (out / "index.json").is_file():
        return
    if not all(_is_leftover(path, names) for path in out.iterdir()):
        raise ConfigError(f"--out={out} is not empty and holds no index.json; choose another")


def _is_leftover(path: Path, names: list[str] | None) -> bool:
    """Returns whether a file was left by a process that was killed before it wrote `index.json`, or is the lock."""
    if path.name == "images.json" and path.is_file():
        return names is None or path.read_bytes() == encode_names(names)
    return path.name in (".images.json.new", ".files.npy.new", ".index.json.new", "files.npy", LOCK_FILE)


def encode_names(names: list[str]) -> bytes:
    """Returns the content of `images.json`."""
    return json.dumps(names, indent=0).encode()


def read_index(path: Path) -> tuple[dict, list[str]]:
    """Reads the metadata and the names: `index.json` and `images.json`. Raises DataError if they are damaged, or
    of a format that cannot be read."""
    metadata, names = read_json(path / "index.json"), read_json(path / "images.json")
    where = f"{path}/index.json"
    metadata = INDEX_FORMAT.upgrade(metadata, where)
    for key, kind in METADATA_TYPES.items():
        require(metadata, key, kind, where)
    if not isinstance(names, list) or len(names) != metadata["images"] or not all(isinstance(x, str) for x in names):
        raise DataError(f"{path}/images.json: is not a list of {metadata['images']} names; make the index again")
    unknown = [str(name)[:60] for name in metadata["arrays"] if not isinstance(name, str) or name not in ARRAYS]
    texts = [*metadata["skipped"], *(metadata["checkpoint"].get(key, "") for key in ("workdir", "parameters"))]
    if unknown or not 0 <= metadata["done"] <= len(names) or not all(isinstance(x, str) for x in texts):
        raise DataError(f"{where}: has values that no index has {unknown or ''}; make the index again")
    if metadata["done"] and "embeddings" not in metadata["arrays"]:
        raise DataError(f"{where}: 'arrays' lacks embeddings; make the index again")
    return metadata, names


def check_checkpoint(out, index_id: dict, checkpoint_id: dict) -> None:
    """Raises ConfigError if an index was made by another checkpoint, or with another tokenizer."""
    same_tokenizer = None in (tokenizers := [x.get("tokenizer") for x in (index_id, checkpoint_id)]) or (
        tokenizers[0] == tokenizers[1]
    )
    if index_id.get("parameters") == checkpoint_id["parameters"] and same_tokenizer:
        return
    maker, other = (f"step {x.get('step')} of {x.get('workdir')}" for x in (index_id, checkpoint_id))
    why = "with other parameters (trained again since, or --ema differs)" if maker == other else f"which is not {other}"
    raise ConfigError(f"the index {out} was made by {maker}, {why}: give that checkpoint, or make the index again")


def create_array(path: Path, rows: int, first: np.ndarray) -> np.ndarray:
    """Creates the array of a file for writing, mapped into memory.

    It has `rows` rows, with the shape and dtype of those of `first`. Raises ConfigError if the disk has no room for it:
    without this check, a later write would kill the process by a signal.
    """
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
    except Exception as e:  # a damaged header can raise any error
        raise DataError(f"{path}: cannot be read as an array ({reason(e)}); make the index again") from None
    shape = getattr(array, "shape", "an archive")
    if shape[:1] != (rows,):
        raise DataError(f"{path}: expected a row for each of {rows} images, found {shape}; make the index again")
    axes, kind = ARRAYS.get(path.stem, (2, "i"))
    if array.ndim != axes or array.dtype.kind != kind:
        raise DataError(f"{path}: expected {axes} axes, found {array.dtype} {shape}; make the index again")
    return array
