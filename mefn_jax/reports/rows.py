"""Rows of a comparison: runs that differ only in the seed, under one name; and the files of a comparison."""

import csv
import dataclasses
import glob
import io
import json
from pathlib import Path

import numpy as np

from mefn_jax.errors import ConfigError
from mefn_jax.reports.pages import is_page
from mefn_jax.runtime.checkpoint_format import OPTIONS_OF_6
from mefn_jax.runtime.console import print0, printable

# Characters with which a spreadsheet begins a formula, also in their full-width forms.
FORMULA_STARTS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")
# Runs that differ only in these options share a row: the seed, and options that do not change the result.
IGNORED_KEYS = ("train.seed", "data.threads", "data.workers", "train.log_every", "train.save_every", "log.", "eval.")


@dataclasses.dataclass(frozen=True)
class Row:
    """Runs that differ only in their seeds, under one name."""

    name: str
    runs: list

    def mean(self, key: str) -> float:
        """Returns the mean of a metric over the seeds."""
        return float(np.mean([run.metrics[key] for run in self.runs]))

    def spread(self, key: str) -> float:
        """Returns the sample standard deviation of a metric over the seeds; NaN for one seed."""
        values = [run.metrics[key] for run in self.runs]
        return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def is_table(path: Path) -> bool:
    """Returns whether a file is a `compare.md` or `compare.csv` of a comparison."""
    with path.open(encoding="utf-8") as file:
        line = file.readline(2000)
    return line.startswith("model,seeds,runs,") or "(paired bootstrap" in line


COMPARISON_FILES = {"compare.md": is_table, "compare.csv": is_table, "compare.html": is_page}


def expand_patterns(patterns: list[str]) -> list[Path]:
    """Returns the directories that match the patterns, in the order of the patterns, each once. Raises ConfigError."""
    paths = []
    for pattern in patterns:
        matches = [Path(p) for p in sorted(glob.glob(pattern)) if Path(p).is_dir()]
        if not matches:
            raise ConfigError(f"{pattern}: no such directory")
        paths += [path for path in matches if path not in paths]
    return paths


def find_result(path: Path, name: str) -> Path:
    """Returns the directory of a result: `path` itself, if it has a `metrics.json`, or `path/name`, or, if that has
    none, the one of averaged parameters, `path/name_ema`."""
    folders = [path, path / name, path / f"{name}_ema"]
    return next((folder for folder in folders if (folder / "metrics.json").is_file()), path / name)


def group_by_seed(runs: list) -> list[Row]:
    """Groups runs whose configurations differ only in the seed into rows, in the order of each row's first run. Prints
    a note if two of a row have the same seed, as two evaluations of one run have."""
    groups = {}
    for run in runs:
        groups.setdefault((run.evaluated, json.dumps(config_without_seed(run), sort_keys=True)), []).append(run)
    groups = list(groups.values())
    for group in groups:
        note_equal_seeds(group)
    return [Row(name, group) for name, group in zip(row_names([g[0] for g in groups]), groups, strict=True)]


def note_equal_seeds(runs: list) -> None:
    """Prints a note for each run of a row whose seed an earlier one has: the spread over seeds is then too small."""
    firsts = {}
    for run in runs:
        first = firsts.setdefault(seed := run.config.get("train.seed"), run)
        if first is not run:
            of_seed = "" if seed is None else f" and the same train.seed={seed}"
            print0(
                f"note: {run.path} and {first.path} have the same options{of_seed}, but count as two seeds; leave one "
                "out if they are one run"
            )


def config_without_seed(run) -> dict:
    """Returns the configuration without the seed and without options that do not change the result. Options that the
    version of a run lacked count as it behaved."""
    return {k: v for k, v in (OPTIONS_OF_6 | run.config).items() if not k.startswith(IGNORED_KEYS)}


def row_names(firsts: list) -> list[str]:
    """Returns the names of rows, given the first run of each: the system, and options if several rows are of one.

    The options are those in which the rows of this system differ.
    """
    names = []
    for run in firsts:
        configs = [config_without_seed(other) for other in firsts if other.evaluated == run.evaluated]
        keys = sorted({k for c in configs for k in c | configs[0] if c.get(k) != configs[0].get(k)})
        options = ", ".join(f"{k}={config_without_seed(run).get(k)}" for k in keys)
        names.append(printable(f"{run.evaluated} ({options})" if options else run.evaluated))
    return names


def csv_of_rows(rows: list[Row], intervals: list, bounded: list[str]) -> str:
    """Returns all numbers of a comparison as CSV, a line for each row: means and standard deviations of the metrics,
    and the bounds of the differences to the first row of the metrics `bounded`.

    `intervals` has for each row a pair of `{metric: (low, high)}`: over resampled units, and over these and the seeds.
    """
    names, out = list(rows[0].runs[0].metrics), io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = [f"{name}.{statistic}" for name in names for statistic in ("mean", "std")]
    bound_columns = [f"{name}.{end}" for name in bounded for end in ("low", "high", "seeds.low", "seeds.high")]
    writer.writerow(["model", "seeds", "runs", *columns, *bound_columns])
    for row, interval in zip(rows, intervals, strict=True):
        numbers = [f"{value:.6g}" for name in names for value in (row.mean(name), row.spread(name))]
        bounds = [f"{bound:.6g}" for name in bounded for kind in interval for bound in kind[name]]
        seeds = " ".join(str(run.config.get("train.seed", "")) for run in row.runs)
        texts = [escape_formula(text) for text in (row.name, seeds, " ".join(str(run.path) for run in row.runs))]
        writer.writerow([*texts, *numbers, *bounds])
    return out.getvalue()


def escape_formula(text: str) -> str:
    """Returns a text on one line that no spreadsheet takes for a formula: with an apostrophe before a first character
    that begins one (as OWASP advises against CSV injection)."""
    text = printable(text)
    return (
        f"'{text}" if text.lstrip(" \N{REPLACEMENT CHARACTER}\N{NO-BREAK SPACE}").startswith(FORMULA_STARTS) else text
    )
