"""Writes and reads the files of an evaluation, `metrics.json` and `ranks.npz` (docs/evaluation.md#files)."""

import io
import json

import jax
import numpy as np
from etils import epath

from mefn_jax.errors import DataError
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


RESULTS_FORMAT = Format(1, DataError, "evaluate the run again", {0: name_evaluated})


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

    Raises DataError if the files are damaged or of a format that cannot be read, FileNotFoundError if one is missing.
    """
    try:
        report = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        with np.load(folder / "ranks.npz", allow_pickle=False) as file:
            ranks = dict(file)
        return RESULTS_FORMAT.upgrade(report, folder / "metrics.json"), ranks
    except FileNotFoundError:
        raise
    except (KeyError, ValueError, TypeError, OSError) as e:
        raise DataError(f"{folder}: cannot be read as an evaluation ({e}); evaluate the run again") from None
