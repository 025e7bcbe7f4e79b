"""Writes and reads the files of an evaluation, `metrics.json` and `ranks.npz` (docs/evaluation.md#files)."""

import io
import json
import math

import jax
import numpy as np
from etils import epath

from mefn_jax.data.parsing import read_json, require
from mefn_jax.errors import DataError, reason
from mefn_jax.metrics import RECALLS
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.formats import Format
from mefn_jax.runtime.storage import write_atomic


def name_evaluated(report: dict) -> dict:
    """Returns the report of format 0, which had no `evaluated`, in format 1.

    There the configuration had what `evaluated` has now: the system's name as `model`, and `evaluated` for averaged
    parameters alone.
    """
    config = report["config"]
    evaluated = report.get("evaluated") or ", ".join(config[k] for k in ("model", "evaluated") if k in config)
    return report | {"evaluated": evaluated, "config": {k: v for k, v in config.items() if k != "evaluated"}}


def add_unknown_data(report: dict) -> dict:
    """Returns the report of format 1, which did not say which data it is of, in format 2."""
    return report | {"data": None}


RESULTS_FORMAT = Format(2, DataError, "evaluate the run again", {0: name_evaluated, 1: add_unknown_data})
METRIC_NAMES = (*(f"r{k}" for k in RECALLS), "medr", "meanr", "map")
PROTOCOL_TYPES = {"split": str, "images": int, "captions": int, "folds": int, "captions_per_image": str, "ties": str}
REPORT_TYPES = {"evaluated": str, "config": dict, "protocol": dict, "i2t": dict, "t2i": dict}
DEPTH = 20  # of nested objects in metrics.json, more than any configuration has


def is_report(path) -> bool:
    """Returns whether a file is a `metrics.json` of an evaluation."""
    return {"i2t", "t2i", "rsum"} <= read_json(path).keys()


def is_ranks(path) -> bool:
    """Returns whether a file is a `ranks.npz` of an evaluation."""
    with np.load(path, allow_pickle=False) as file:
        return {"i2t", "t2i", "caption_image"} <= set(file.files)


RESULT_FILES = {"metrics.json": is_report, "ranks.npz": is_ranks}


def write_results(folder: epath.Path, report: dict, ranks: dict) -> None:
    """Writes `metrics.json` and `ranks.npz` into a folder, on process 0. Raises DataError if that is not possible."""
    if jax.process_index():
        return
    ranks_file = io.BytesIO()
    np.savez(ranks_file, **ranks)
    try:
        write_atomic(folder / "metrics.json", json.dumps({"format": RESULTS_FORMAT.number} | report, indent=1).encode())
        write_atomic(folder / "ranks.npz", ranks_file.getvalue())
    except OSError as e:
        raise DataError(f"{folder}: cannot be written ({e})") from e
    print0(f"wrote {folder}/metrics.json and ranks.npz")


def read_results(folder) -> tuple[dict, dict[str, np.ndarray]]:
    """Reads the report and the ranks of an evaluation.

    Raises DataError if the files are damaged, do not belong together, or are of a format that cannot be read;
    FileNotFoundError if one is missing.
    """
    report = read_report(folder / "metrics.json")
    path = folder / "ranks.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            ranks = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except Exception as e:  # a damaged archive can raise any error
        raise DataError(f"{path}: cannot be read as ranks ({reason(e)}); evaluate the run again") from None
    check_ranks(ranks, report["protocol"], path)
    return report, ranks


def read_report(path) -> dict:
    """Reads the `metrics.json` of an evaluation.

    Raises DataError if it is damaged or of a format that cannot be read, FileNotFoundError if it is missing.
    """
    if not path.exists():
        raise FileNotFoundError(2, "no such file", str(path))
    report = read_json(path)
    try:
        if not _is_shallow(report, DEPTH):
            raise DataError("nested too deeply")
        report = RESULTS_FORMAT.upgrade(report, path)
        for key, kind in REPORT_TYPES.items():
            require(report, key, kind, str(path))
        for key, kind in PROTOCOL_TYPES.items():
            require(report["protocol"], key, kind, str(path))
        # A certified evaluation has no metrics of whole rankings.
        names = [f"r{k}" for k in RECALLS] if "certified" in report else METRIC_NAMES
        numbers = [report.get("rsum"), *(report[side].get(name) for side in ("i2t", "t2i") for name in names)]
        if not all(is_number(x) for x in numbers):
            raise DataError("a metric is missing, or is no finite number")
        if not isinstance(report["data"], dict | None):
            raise DataError("'data' is no object")
    except (DataError, KeyError, TypeError, AttributeError) as e:
        text = str(e) if isinstance(e, DataError) else reason(e)
        text = text if text.startswith(str(path)) else f"{path}: {text}"
        raise DataError(f"{text}; cannot be read as an evaluation: evaluate the run again") from None
    return report


def check_ranks(ranks: dict, protocol: dict, path) -> None:
    """Raises DataError unless `ranks` has the arrays of an evaluation with this protocol (docs/evaluation.md#files)."""
    sizes = {"i2t": protocol["images"], "t2i": protocol["captions"], "caption_image": protocol["captions"]}
    for name, size in sizes.items():
        array = ranks.get(name)
        if array is None or array.dtype.kind not in "iu" or array.shape != (size,) or not size:
            found = "nothing" if array is None else f"{array.dtype} {array.shape}"
            raise DataError(
                f"{path}: {name} should be {size} whole numbers, as in metrics.json, found {found}; evaluate the run "
                "again"
            )
    image = ranks["caption_image"]
    if min(ranks["i2t"].min(), ranks["t2i"].min()) < 1 or image.min() < 0 or image.max() >= sizes["i2t"]:
        raise DataError(f"{path}: has ranks below 1, or images that do not exist; evaluate the run again")


def is_number(x) -> bool:
    """Returns whether a value of a JSON file is a finite number."""
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 1e300 and math.isfinite(x)


def _is_shallow(value, depth: int) -> bool:
    """Returns whether objects and lists are nested at most `depth` deep."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_is_shallow(child, depth - 1) for child in children)
