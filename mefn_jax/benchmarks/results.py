"""Writes and reads the files of a benchmark's result, `metrics.json` and `measures.npz` (docs/evaluation.md)."""

import io
import json
from pathlib import Path

import jax
import numpy as np
from etils import epath

from mefn_jax.benchmarks.measures import STATISTICS, Measure
from mefn_jax.data.parsing import read_json, require
from mefn_jax.errors import DataError, reason
from mefn_jax.evaluation.results import is_number
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.formats import Format
from mefn_jax.runtime.storage import write_atomic

BENCHMARK_FORMAT = Format(1, DataError, "run the benchmark again")
REPORT_KEYS = {
    "benchmark": str,
    "evaluated": str,
    "config": dict,
    "protocol": dict,
    "data": dict,
    "measures": list,
    "units": int,
    "unit": str,
}
MEASURE_KEYS = {"row": str, "column": str, "statistic": str, "queries": int}


def is_benchmark_report(path) -> bool:
    """Returns whether a file is the `metrics.json` of a benchmark."""
    report = read_json(path)
    return isinstance(report, dict) and {"benchmark", "measures"} <= report.keys()


def is_measures(path) -> bool:
    """Returns whether a file is the `measures.npz` of a benchmark: every array is one of a measure's."""
    names = {name for statistic in STATISTICS.values() for name in statistic.arrays}
    with np.load(path, allow_pickle=False) as file:
        return bool(file.files) and all(name.partition("/")[2] in names for name in file.files)


BENCHMARK_FILES = {"metrics.json": is_benchmark_report, "measures.npz": is_measures}


def write_benchmark(folder: epath.Path, report: dict, measures: list[Measure]) -> None:
    """Writes `metrics.json` and `measures.npz` into a folder, on process 0. Raises DataError if that is not
    possible."""
    if jax.process_index():
        return
    arrays = {f"{k}/{name}": array for k, measure in enumerate(measures) for name, array in measure.arrays.items()}
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    text = json.dumps({"format": BENCHMARK_FORMAT.number} | report, indent=1)
    try:
        write_atomic(folder / "metrics.json", text.encode())
        write_atomic(folder / "measures.npz", file.getvalue())
    except OSError as e:
        raise DataError(f"{folder}: cannot be written ({e})") from e
    print0(f"wrote {folder}/metrics.json and measures.npz")


def read_benchmark(folder: Path) -> tuple[dict, list[Measure]]:
    """Reads the report and the measures of a benchmark.

    Raises DataError if the files are damaged, do not belong together, or are of a format that cannot be read;
    FileNotFoundError if one is missing.
    """
    path = folder / "metrics.json"
    if not path.exists():
        raise FileNotFoundError(2, "no such file", str(path))
    report = BENCHMARK_FORMAT.upgrade(read_json(path), path)
    for key, kind in REPORT_KEYS.items():
        require(report, key, kind, str(path))
    for k, entry in enumerate(report["measures"]):
        for key, kind in MEASURE_KEYS.items():
            require(entry, key, kind, f"{path}: measures[{k}]")
        if not is_number(entry.get("value")) or entry["statistic"] not in STATISTICS:
            raise DataError(f"{path}: measures[{k}]: has no number or no known statistic; run the benchmark again")
    return report, _read_measures(folder / "measures.npz", report)


def _read_measures(path: Path, report: dict) -> list[Measure]:
    """Reads the arrays of the measures of a report. Raises DataError as `read_benchmark` does."""
    try:
        with np.load(path, allow_pickle=False) as file:
            measures = [
                Measure(
                    entry["row"],
                    entry["column"],
                    entry["statistic"],
                    {name: file[f"{k}/{name}"] for name in STATISTICS[entry["statistic"]].arrays},
                    entry["queries"],
                    entry.get("chance"),
                )
                for k, entry in enumerate(report["measures"])
            ]
        values = [float(measure.compute(np.ones((1, report["units"])))[0]) for measure in measures]
    except FileNotFoundError:
        raise
    except Exception as e:  # a damaged archive can raise any error
        raise DataError(f"{path}: cannot be read as measures ({reason(e)}); run the benchmark again") from None
    for entry, value in zip(report["measures"], values, strict=True):
        if not abs(entry["value"] - value) <= 1e-6 * max(1.0, abs(value)):
            raise DataError(
                f"{path}: {entry['row']}.{entry['column']} is {value:.6g}, but {entry['value']:.6g} in "
                "metrics.json; run the benchmark again"
            )
    return measures
