"""Reading of the files of a checkpoint in Hugging Face layout: as data only, and none that lies outside."""

import json
import os
from pathlib import Path

from mefn_jax.errors import WeightsError

CHECKPOINT_FILES = ("*.json", "*.safetensors", "vocab.txt", "merges.txt")  # files that are downloaded and read


def locate_file(directory: Path, name: str, where: str) -> Path:
    """Returns the path of the file `name` below a checkpoint's directory.

    Raises WeightsError, naming `where` the name stands, if the file lies outside of the directory (also through a link)
    or the name is no usable one.
    """
    path = directory / name
    try:
        is_inside = path.resolve().is_relative_to(_find_root(directory))
        if os.path.lexists(path):
            path.stat()  # raises for links in a circle
        path.exists()  # raises for names that the file system cannot hold
    except (OSError, ValueError, RuntimeError) as e:  # names that are too long or hold zero bytes, links in a circle
        raise WeightsError(f"{where}: {name[:80]!r} is no usable file name ({e})") from None
    if not is_inside:
        raise WeightsError(f"{where}: {name[:200]!r} leaves the directory; copy the file into {directory}")
    return path


def _find_root(directory: Path) -> Path:
    """Returns the directory in which all files must lie: the checkpoint's own, or, in the hub's local cache, where
    `snapshots/REVISION` links to `blobs`, the directory above both."""
    own = directory.resolve()
    in_cache = own.parent.name == "snapshots" and own.parent.parent.name.startswith("models--")
    return own.parent.parent if in_cache else own


def check_links(directory: Path) -> None:
    """Raises WeightsError if a file that this package or `transformers` would read is a link out of the directory."""
    for pattern in CHECKPOINT_FILES:
        for path in sorted(directory.glob(pattern)):
            if path.is_symlink():
                locate_file(directory, path.name, str(path))


def read_json_value(path: Path):
    """Returns the value that a JSON file holds. Raises WeightsError if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise WeightsError(f"{path}: is not JSON ({to_one_line(e)})") from None
    except RecursionError:
        raise WeightsError(f"{path}: is not JSON that can be read (nested too deeply)") from None


def read_object(path: Path) -> dict:
    """Returns the object that a JSON file holds. Raises WeightsError if it is not JSON, or holds something else."""
    value = read_json_value(path)
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def read_section(path: Path, values: dict, key: str) -> dict | None:
    """Returns the object at `key` of `values`, which `path` holds; None if it is missing or null. Raises WeightsError
    for a value of another type."""
    section = values.get(key)
    if section is not None and not isinstance(section, dict):
        raise WeightsError(f"{path}: {key} holds a {type(section).__name__}, not an object")
    return section


def import_transformers():
    """Imports `transformers` (which takes seconds) and returns it; its advice about PyTorch is not printed."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def to_one_line(message) -> str:
    """Returns a message, or that of an error, on one line, at most 300 characters."""
    return " ".join(str(message).split())[:300]
