"""Summary of a sweep, from the results that are there: mean and deviation over seeds for each model and each
combination of the grid, as a table in Markdown and as CSV."""

import contextlib
import csv
import io
import time
from pathlib import Path

import numpy as np
from etils import epath

from mefn_jax.errors import ConfigError, DataError, LockError
from mefn_jax.evaluation.results import read_report
from mefn_jax.metrics import RECALLS
from mefn_jax.reports.rows import escape_formula
from mefn_jax.runtime.lock import hold_lock
from mefn_jax.runtime.storage import write_atomic
from mefn_jax.sweeps.plan import PlannedRun

METRICS = (*(f"{side}.r{k}" for side in ("i2t", "t2i") for k in RECALLS), "rsum")
METRIC_TITLES = (*(f"{side} R@{k}" for side in ("i2t", "t2i") for k in RECALLS), "rSum")
LOCK_SECONDS = 60.0  # longest wait for another job that writes the summary


def is_summary(path: Path) -> bool:
    """Returns whether a file is a summary of a sweep."""
    with path.open(encoding="utf-8") as file:
        return file.readline(2000).startswith(("model,", "| model |"))


SUMMARY_FILES = {"summary.md": is_summary, "summary.csv": is_summary}


def write_summary(runs: list[PlannedRun], out: Path, split: str) -> str:
    """Writes `summary.md` and `summary.csv` of the finished runs into the directory of a sweep, and returns the first.

    Results are read while the directory is locked, so that of several jobs the last one's summary has the results of
    all. Raises ConfigError if the files cannot be written, LockError if another job does not finish to write them.
    """
    deadline = time.monotonic() + LOCK_SECONDS
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold_lock("--out", out))
                break
            except LockError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        rows = group_results(runs, split)
        table = to_table(rows)
        try:
            write_atomic(epath.Path(out / "summary.md"), table.encode())
            write_atomic(epath.Path(out / "summary.csv"), to_csv_text(rows).encode())
        except OSError as e:
            raise ConfigError(f"--out={out}: cannot be written ({e.strerror})") from e
    return table


def group_results(runs: list[PlannedRun], split: str) -> list[tuple[PlannedRun, int, dict[int, list[float]]]]:
    """Returns a row for each model and combination of the grid, in order: its first run, the number of its runs, and
    the METRICS of each seed that is finished."""
    groups = {}
    for run in runs:
        groups.setdefault(run.setting, []).append(run)
    return [(group[0], len(group), _read_metrics(group, split)) for group in groups.values()]


def _read_metrics(runs: list[PlannedRun], split: str) -> dict[int, list[float]]:
    metrics = {}
    for run in runs:
        with contextlib.suppress(DataError, FileNotFoundError):  # the run's own line says what is wrong
            report = read_report(run.report(split))
            recalls = [report[side][f"r{k}"] for side in ("i2t", "t2i") for k in RECALLS]
            metrics[run.seed] = [*recalls, report["rsum"]]
    return metrics


def to_table(rows) -> str:
    """Returns the rows of `group_results` as a table in Markdown: means, and standard deviations from two seeds on."""
    keys = list(rows[0][0].grid) if rows else []
    lines = ["model", *keys, "seeds", *METRIC_TITLES], ["---"] * (len(keys) + 2 + len(METRIC_TITLES))
    lines = [*lines, *([run.model, *run.grid.values(), *_format_cells(number, m)] for run, number, m in rows)]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def _format_cells(number: int, metrics: dict[int, list[float]]) -> list[str]:
    seeds = str(number) if len(metrics) == number else f"{len(metrics)} of {number}"
    columns = zip(*metrics.values(), strict=True) if metrics else [()] * len(METRICS)
    return [seeds, *map(_format_mean, columns)]


def _format_mean(values: tuple[float, ...]) -> str:
    if not values:
        return "-"
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def to_csv_text(rows) -> str:
    """Returns the rows of `group_results` as CSV: the seeds that are finished, means and standard deviations; the
    latter are empty for one seed, and both without any."""
    keys, out = list(rows[0][0].grid) if rows else [], io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", *keys, "seeds", *(f"{m}.{statistic}" for m in METRICS for statistic in ("mean", "std"))])
    for run, _, metrics in rows:
        numbers = []
        for values in zip(*metrics.values(), strict=True) if metrics else [()] * len(METRICS):
            numbers.append(f"{np.mean(values):.6g}" if values else "")
            numbers.append(f"{np.std(values, ddof=1):.6g}" if len(values) > 1 else "")
        texts = [run.model, *run.grid.values(), " ".join(map(str, metrics))]
        writer.writerow([*map(escape_formula, texts), *numbers])
    return out.getvalue()
