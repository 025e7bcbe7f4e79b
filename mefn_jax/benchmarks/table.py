"""The table of a benchmark: a row for each subset, language or direction, a column for each measure."""

from collections.abc import Iterable

import numpy as np

from mefn_jax.benchmarks.measures import Measure, compute_intervals, compute_value
from mefn_jax.runtime.console import print0, printable

COLUMN_TITLES = {
    "hubs": "first answer is common",
    "r1": "R@1",
    "r5": "R@5",
    "r10": "R@10",
    "rsum": "rSum",
    "map_at_r": "mAP@R",
    "r_precision": "R-Precision",
    "tau_b": "tau-b",
    "tau_c": "tau-c",
    "top1": "top-1",
    "top5": "top-5",
    "per_class": "per class",
}


def make_entries(measures: list[Measure], units: int) -> list[dict]:
    """Returns measures as `metrics.json` has them, with value and interval, which is null where there is none.

    Raises DataError for a measure that is undefined.
    """
    entries, values = [], [compute_value(measure, units) for measure in measures]
    for measure, value, (low, high) in zip(measures, values, compute_intervals(measures, units), strict=True):
        fields = {key: getattr(measure, key) for key in ("row", "column", "statistic", "queries", "chance")}
        bounds = {"low": low, "high": high} if np.isfinite(low) else {"low": None, "high": None}
        entries.append(fields | {"value": value} | bounds)
    return entries


def column_title(column: str) -> str:
    """Returns how a table names a column."""
    side, _, name = column.rpartition(".")
    return f"{side} {COLUMN_TITLES.get(name, name)}".strip()


def format_measure(entry: dict) -> str:
    """Returns a cell: the value with its 95 % interval, if it has one."""
    if entry["low"] is None:
        return f"{entry['value']:.1f}"
    return f"{entry['value']:.1f} [{entry['low']:.1f}, {entry['high']:.1f}]"


def make_table(measures: list[dict]) -> list[list[str]]:
    """Returns the cells of the table of measures as `metrics.json` has them, the titles first. The last columns are
    the chance of each measure of a row, and the number of its queries."""
    rows, columns = (list(dict.fromkeys(entry[key] for entry in measures)) for key in ("row", "column"))
    cells = {(entry["row"], entry["column"]): entry for entry in measures}
    table = [["", *map(column_title, columns), "chance", "queries"]]
    for row in rows:
        of_row = [cells.get((row, column)) for column in columns]
        values = [format_measure(entry) if entry else "" for entry in of_row]
        table.append(
            [
                printable(row),
                *values,
                _join_distinct(of_row, "chance", "{:.1f}"),
                _join_distinct(of_row, "queries", "{:,}"),
            ]
        )
    return table


def _join_distinct(entries: Iterable[dict | None], key: str, form: str) -> str:
    """Returns the values of `key` of the entries, as one if all are equal."""
    values = ["-" if entry[key] is None else form.format(entry[key]) for entry in entries if entry]
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def print_benchmark(title: str, measures: list[dict]) -> None:
    """Prints the table of measures below its title."""
    print0(f"\n{title}")
    table = make_table(measures)
    widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
    for row in table:
        cells = [
            f"{cell:<{width}}" if not k else f"{cell:>{width}}"
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print0("  ".join(cells).rstrip())
