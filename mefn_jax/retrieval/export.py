"""Exports an index in the layout of clip-retrieval, so that another engine serves what outgrows one machine.

`DIR/metadata/metadata_K.parquet` has a row for each image that could be decoded: `image_path`, and `caption`, which is
empty, as a folder of images has none. In the same order, `parquet` writes `DIR/img_emb/img_emb_K.npy`, float32
`(n, D)`, and `faiss` the file `DIR/image.index`, an exact index of inner products. `DIR/export.json` says what made
them. Another engine finds the images nearest by embedding; the matcher needs this project's own index. I images.
"""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
from etils import epath

from mefn_jax.config import require_local
from mefn_jax.data.parsing import read_json
from mefn_jax.errors import ConfigError, reason
from mefn_jax.retrieval.index import Index, open_index
from mefn_jax.retrieval.index_files import create_array
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.lock import LOCK_FILE, hold_lock
from mefn_jax.runtime.outputs import check_output_directory
from mefn_jax.runtime.storage import write_atomic

ROWS_OF_FILE = 1_000_000  # images in one file of vectors and one of metadata
EXPORTED_AT_ONCE = 1 << 16  # vectors and names that are in memory at once
INDEX_EXPORT_FORMAT = 1
EXPORT_FILE, STAGING = "export.json", ".export"  # the description, and the folder of an export that is not complete
CONTENT = ("img_emb", "metadata", "image.index")  # what an export may have besides


def export_index(index, kind: str, out) -> None:
    """Writes an index into the directory `out` for other engines; `kind` is a key of EXPORTS.

    An earlier export there is replaced when the new one is complete. Raises ConfigError for an `out` that holds
    something else or cannot be written, and if a package is missing; errors of the index as `open_index` does.
    """
    require_local("--index", index)
    require_local("--out", out)
    write_vectors, module, package = EXPORTS[kind]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"--export={kind} needs the package {package}: pip install {package}")
    out = Path(out)
    check_export_directory(out)
    opened = open_index(index)
    staging, rows = out / STAGING, np.flatnonzero(opened.readable)
    with hold_lock("--out", out):
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            write_metadata(opened, rows, staging / "metadata")
            write_vectors(opened, rows, staging)
            replace_export(out, describe_export(index, opened, rows, kind))
        except OSError as e:
            raise ConfigError(f"--out={out}: cannot be written ({e.strerror or e})") from e
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    print0(f"wrote {out}: {len(rows)} images, vectors of width {opened.embeddings.shape[1]}")


def check_export_directory(out: Path) -> None:
    """Raises ConfigError if a directory cannot be written, or holds something else than an export."""
    check_output_directory("--out", out, {})
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if names - {LOCK_FILE} and not names & {EXPORT_FILE, STAGING}:
        raise ConfigError(f"--out={out} is not empty and holds no {EXPORT_FILE}; choose another")


def describe_export(path, opened: Index, rows: np.ndarray, kind: str) -> dict:
    """Returns the content of `export.json`."""
    return {
        "format": INDEX_EXPORT_FORMAT,
        "kind": kind,
        "checkpoint": read_json(Path(path) / "index.json")["checkpoint"],
        "images": len(rows),
        "width": opened.embeddings.shape[1],
        "metric": "inner product",
    }


def replace_export(out: Path, description: dict) -> None:
    """Moves a complete export from its staging folder to where it belongs, in place of an earlier one. The description
    goes first and comes last, so that a directory that has one is complete."""
    (out / EXPORT_FILE).unlink(missing_ok=True)
    for name in CONTENT:
        path = out / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        if (out / STAGING / name).exists():
            os.replace(out / STAGING / name, path)
    write_atomic(epath.Path(out / EXPORT_FILE), json.dumps(description, indent=1).encode())


def write_metadata(opened: Index, rows: np.ndarray, folder: Path) -> None:
    """Writes the paths of images `rows (I,)` into files of Parquet. A name that is not UTF-8 has escapes, `\\xe9`, in
    place of the other bytes; the number of such names is printed."""
    import pyarrow
    from pyarrow import parquet

    folder.mkdir()
    schema = pyarrow.schema([("image_path", pyarrow.string()), ("caption", pyarrow.string())])
    num_escaped = 0
    for name, part in split_rows(rows, "metadata", "parquet"):
        with parquet.ParquetWriter(folder / name, schema) as writer:
            for first in range(0, len(part), EXPORTED_AT_ONCE):
                paths = [str(opened.folder / opened.names[row]) for row in part[first : first + EXPORTED_AT_ONCE]]
                texts = [os.fsencode(path).decode("utf-8", "backslashreplace") for path in paths]
                num_escaped += sum(a != b for a, b in zip(texts, paths, strict=True))
                table = {"image_path": texts, "caption": [""] * len(texts)}
                writer.write_table(pyarrow.table(table, schema))
    if num_escaped:
        print0(f"warning: the paths of {num_escaped} images are not UTF-8; the metadata have escapes in them")


def write_arrays(opened: Index, rows: np.ndarray, folder: Path) -> None:
    """Writes the vectors of images `rows (I,)` into files of NumPy below `folder`."""
    (folder / "img_emb").mkdir()
    for name, part in split_rows(rows, "img_emb", "npy"):
        array = create_array(folder / "img_emb" / name, len(part), opened.embeddings[:1])
        for first, vectors in read_vectors(opened, part):
            array[first : first + len(vectors)] = vectors
        array.flush()


def write_faiss(opened: Index, rows: np.ndarray, folder: Path) -> None:
    """Writes the vectors of images `rows (I,)` into an index of faiss. Raises OSError."""
    faiss = importlib.import_module("faiss")
    index = faiss.IndexFlatIP(opened.embeddings.shape[1])
    for _, vectors in read_vectors(opened, rows):
        index.add(np.ascontiguousarray(vectors, np.float32))
    try:
        faiss.write_index(index, str(folder / "image.index"))
    except RuntimeError as e:
        raise OSError(reason(e)) from e


def read_vectors(opened: Index, rows: np.ndarray):
    """Yields the vectors of images, EXPORTED_AT_ONCE at a time, and the position in `rows` of the first."""
    for first in range(0, len(rows), EXPORTED_AT_ONCE):
        yield first, opened.embeddings[rows[first : first + EXPORTED_AT_ONCE]]


def split_rows(rows: np.ndarray, name: str, suffix: str):
    """Yields the names and the rows of files of at most ROWS_OF_FILE rows: `NAME_0.npy`, or `NAME_00.npy` with more
    than ten files."""
    parts = [rows[first : first + ROWS_OF_FILE] for first in range(0, len(rows), ROWS_OF_FILE)]
    digits = len(str(len(parts) - 1))
    for k, part in enumerate(parts):
        yield f"{name}_{k:0{digits}}.{suffix}", part


# By the value of `--export`: a function that writes the vectors, the module that it needs, and the package of that.
EXPORTS = {"parquet": (write_arrays, "pyarrow", "pyarrow"), "faiss": (write_faiss, "faiss", "faiss-cpu")}
