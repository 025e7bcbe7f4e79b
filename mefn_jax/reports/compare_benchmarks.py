"""Compares models on one benchmark: every measure with its difference to the first row's, and its interval.

M measures, R resamples, S seeds. All rows see the same resamples of the benchmark's units (paired bootstrap), while
each draws from its own seeds (docs/method.md, Eq. 66).
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mefn_jax import config as configuration
from mefn_jax.benchmarks.measures import RESAMPLES_AT_ONCE, STATISTICS, Measure, bound_values
from mefn_jax.benchmarks.results import is_benchmark_report, read_benchmark
from mefn_jax.benchmarks.table import column_title
from mefn_jax.data.parsing import read_json
from mefn_jax.errors import DataError
from mefn_jax.evaluation.bootstrap import RESAMPLES, draw_resamples, draw_shares
from mefn_jax.reports.rows import Row, csv_of_rows, expand_patterns, find_result, group_by_seed
from mefn_jax.runtime.console import printable


@dataclasses.dataclass(frozen=True)
class BenchmarkRun:
    """Result of one run on a benchmark.

    Attributes:
        path: the directory that was given for the run.
        evaluated: the system, as `rows.group_by_seed` takes it.
        config, metrics: flat, by names such as `train.seed` and `swap_obj.accuracy`.
        report: the content of its `metrics.json`.
        measures: the measures by name, with what they are computed from.
    """

    path: Path
    evaluated: str
    config: dict
    metrics: dict
    report: dict
    measures: dict[str, Measure]


class Difference(NamedTuple):
    """95 % intervals of a row's difference to the first row, by measure, `(low, high)`: over resampled units, and over
    resampled units and seeds."""

    units: dict
    seeds: dict


def find_benchmark(patterns: list[str]) -> str:
    """Returns the benchmark of which the first directory that is named has a result; "" if it has none itself."""
    path = expand_patterns(patterns[:1])[0] / "metrics.json"
    return str(read_json(path)["benchmark"]) if path.is_file() and is_benchmark_report(path) else ""


def compare_benchmarks(patterns: list[str], name: str) -> dict[str, str]:
    """Compares runs on the benchmark `name`; returns the tables by the ending of their file: md, csv, html.

    `patterns` are workdirs, directories with a `metrics.json` of the benchmark, or globs of these. Raises ConfigError
    or DataError if there is nothing to compare, or if the runs were scored on other data.
    """
    runs = [read_run(path, name) for path in expand_patterns(patterns)]
    check_same_cases(runs)
    rows = group_by_seed(runs)
    differences = resample_differences(rows)
    return {
        "md": table_of_benchmark(rows, differences),
        "csv": csv_of_rows(rows, differences, list(rows[0].runs[0].metrics)),
        "html": page_of_benchmark(rows, differences),
    }


def read_run(path: Path, name: str) -> BenchmarkRun:
    """Reads the result on a benchmark that `find_result` finds in `path` or in `path/benchmarks`. Raises DataError if
    it does not exist, cannot be read, or is of another benchmark."""
    folder = find_result(path, f"benchmarks/{name}")
    try:
        if (folder / "metrics.json").is_file() and not is_benchmark_report(folder / "metrics.json"):
            raise DataError(f"{folder}: is the evaluation of a split, not of the benchmark {name}")
        report, measures = read_benchmark(folder)
    except FileNotFoundError as e:
        raise DataError(f"{e.filename}: no such file; run python eval.py benchmark {name} --workdir={path}") from None
    if report["benchmark"] != name:
        raise DataError(f"{folder}: is of the benchmark {report['benchmark']}, not of {name}")
    config = configuration.flatten({k: v for k, v in report["config"].items() if k != "model"})
    metrics = {measure.name: float(entry["value"]) for measure, entry in zip(measures, report["measures"], strict=True)}
    return BenchmarkRun(path, report["evaluated"], config, metrics, report, {m.name: m for m in measures})


def check_same_cases(runs: list[BenchmarkRun]) -> None:
    """Raises DataError unless all runs have the same measures of the same images, captions and cases."""
    first = runs[0]
    for run in runs[1:]:
        if run.report["data"].get("digest") != first.report["data"].get("digest"):
            raise DataError(
                f"{run.path}: was scored on other images, captions or cases than {first.path}; only results on the "
                "same data can be compared"
            )
        if list(run.metrics) != list(first.metrics) or run.report["units"] != first.report["units"]:
            raise DataError(f"{run.path}: has other measures than {first.path}; run the benchmark again for both")


def resample_differences(rows: list[Row], seed: int = 0) -> list[Difference]:
    """Returns each row's 95 % intervals of the differences of all measures to the first row's."""
    first = rows[0].runs[0]
    seed_rng = np.random.default_rng((seed, 1))
    shares = [draw_shares(len(row.runs), seed_rng, RESAMPLES) for row in rows]  # (R, S) each
    values = {name: [] for name in first.measures}  # blocks of (rows, 2, R')
    start = 0
    for draws in draw_resamples(first.report["units"], RESAMPLES, seed, RESAMPLES_AT_ONCE):
        block = slice(start, start + len(draws))
        for name, measure in first.measures.items():
            if start < STATISTICS[measure.statistic].resamples:
                values[name].append(
                    [_resample(row, name, draws, s[block]) for row, s in zip(rows, shares, strict=True)]
                )
        start += len(draws)
    result = []
    blocks = {name: np.concatenate(parts, -1) for name, parts in values.items()}  # (rows, 2, R)
    for k in range(len(rows)):
        bounds = {name: _bound_differences(x[k] - x[0]) for name, x in blocks.items()}
        result.append(Difference(*({name: both[kind] for name, both in bounds.items()} for kind in (0, 1))))
    return result


def _resample(row: Row, name: str, draws: np.ndarray, shares: np.ndarray) -> list[np.ndarray]:
    """Returns a measure of a row in a block of resamples, `(R',)`: the mean of all seeds, and of drawn seeds."""
    of_seeds = np.stack([run.measures[name].compute(draws) for run in row.runs], 1)  # (R', S)
    return [of_seeds.mean(1), np.sum(of_seeds * shares, 1)]


def _bound_differences(values: np.ndarray) -> list[tuple[float, float]]:
    """Returns the bounds of differences `(2, R)` (see `bound_values`)."""
    return [bound_values(x) for x in values]


def describe_comparison(rows: list[Row]) -> str:
    """Returns what was compared and the meaning of the numbers, in one line."""
    report = rows[0].runs[0].report
    p = report["protocol"]
    sizes = ", ".join(f"{value:,} {key}" for key, value in p.items() if type(value) is int)
    ties = f"; ties {p['ties']}" if "ties" in p else ""
    units = f"{report['units']:,} {report['unit']}"
    return printable(
        f"{report['benchmark']}: {sizes}{ties}. Mean ± standard deviation over seeds; in brackets 95 % intervals of "
        f"the difference to the first system (paired bootstrap of the {units}; after a slash, of these and of each "
        "system's seeds)."
    )


def make_cells(rows: list[Row], differences: list[Difference]) -> tuple[list[str], list[list[str]]]:
    """Returns the titles and the rows of the table: a row for each measure, and for each system its mean and, but for
    the first, the difference to the first with its intervals."""
    titles = ["measure", "chance", rows[0].name]
    titles += [title for row in rows[1:] for title in (row.name, "minus the first")]
    cells = []
    for name, measure in rows[0].runs[0].measures.items():
        chance = "-" if measure.chance is None else f"{measure.chance:.1f}"
        line = [f"{measure.row}, {column_title(measure.column)}", chance, _format_mean(rows[0], name)]
        for row, difference in zip(rows[1:], differences[1:], strict=True):
            line += [_format_mean(row, name), _format_change(row, rows[0], name, difference)]
        cells.append([printable(cell) for cell in line])
    return titles, cells


def _format_mean(row: Row, name: str) -> str:
    """Returns the mean of a measure over the seeds, and its standard deviation if there are several."""
    return f"{row.mean(name):.1f}" + (f" ± {row.spread(name):.1f}" if len(row.runs) > 1 else "")


def _format_change(row: Row, first: Row, name: str, difference: Difference) -> str:
    """Returns the difference of a measure to the first row's, with its interval over units and, for several seeds, over
    units and seeds."""
    units, seeds = (f"[{low:+.1f}, {high:+.1f}]" for low, high in (kind[name] for kind in difference))
    if not np.isfinite(difference.units[name][0]):
        return f"{row.mean(name) - first.mean(name):+.1f}"
    has_seeds = min(len(row.runs), len(first.runs)) > 1
    return f"{row.mean(name) - first.mean(name):+.1f} {units}" + (f" / {seeds}" if has_seeds else "")


def table_of_benchmark(rows: list[Row], differences: list[Difference]) -> str:
    """Returns the table as Markdown, below a line that says what was compared."""
    titles, cells = make_cells(rows, differences)
    lines = [describe_comparison(rows), ""]
    for line in (titles, ["---"] * len(titles), *cells):
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |")
    return "\n".join([*lines, ""])


def page_of_benchmark(rows: list[Row], differences: list[Difference]) -> str:
    """Returns the comparison as a page that needs no other file."""
    from mefn_jax.reports import pages  # imports jinja2, which only this needs

    titles, cells = make_cells(rows, differences)
    return pages.template("compare.html").render(
        protocol=describe_comparison(rows), chart="", titles=titles, cells=cells
    )
