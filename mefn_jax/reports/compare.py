"""Compares evaluated runs in one table (docs/evaluation.md).

    python eval.py compare DIR DIR 'runs/*/0' --out=DIR [--split=test]
    python eval.py compare DIR DIR 'runs/*/0' --out=DIR --benchmark=NAME     results of eval.py benchmark NAME

Runs whose configurations differ only in the seed share a row: mean and standard deviation over seeds. The difference of
each row to the first has two bootstrap intervals from the runs' `ranks.npz` (docs/method.md, Eq. 66): images are
resampled with their captions, and within a resample a row is the average of its seeds; in the second interval, of seeds
that are resampled too. I images, R resamples, S seeds.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

from mefn_jax import config as configuration
from mefn_jax.benchmarks.results import is_benchmark_report
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.evaluation.bootstrap import RESAMPLES, draw_resamples, draw_shares, percentile_bounds
from mefn_jax.evaluation.results import METRIC_NAMES, read_results
from mefn_jax.evaluation.run import define_split_flag, split_from_flags
from mefn_jax.metrics import RECALLS
from mefn_jax.reports.compare_benchmarks import compare_benchmarks, find_benchmark
from mefn_jax.reports.rows import COMPARISON_FILES, Row, csv_of_rows, expand_patterns, find_result, group_by_seed
from mefn_jax.runtime.cli import define_path_flag
from mefn_jax.runtime.console import print0, printable
from mefn_jax.runtime.outputs import check_output_directory
from mefn_jax.runtime.storage import write_atomic

SIDES = ("i2t", "t2i")
RECALL_COLUMNS = [f"{side}.r{k}" for side in SIDES for k in RECALLS] + ["rsum"]  # layout of the field's tables
PAPER_COLUMNS = [f"{side}.{m}" for side in SIDES for m in ("r1", "r5", "map")]  # layout of the MEFN paper's Tables 1-3
TITLES = {"r1": "R@1", "r5": "R@5", "r10": "R@10", "map": "mAP", "rsum": "rSum"}
DIFFERENCES = "rSum minus the first row", "over images and seeds"  # columns of intervals


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Evaluation of one run on a split.

    Attributes:
        path: the directory that was given for the run.
        evaluated: the system: the model's name, or another such as "ensemble of 2" or "mefn, averaged parameters".
        config, metrics: flat, by names such as `train.seed` and `i2t.r1`.
        protocol: what the metrics were computed from (`table.describe_protocol`).
        gallery: digest of the image ids and captions; None if it is not known.
        hits: float64 `(I, 6)`. Columns 0 to 2: 1 if the image has a positive among its first 1, 5, 10 captions. Columns
            3 to 5: the number of the image's captions that have it among their first 1, 5, 10 images.
        captions: int64 `(I,)`, the number of captions of each image.
    """

    path: Path
    evaluated: str
    config: dict
    metrics: dict
    protocol: dict
    gallery: str | None
    hits: np.ndarray
    captions: np.ndarray


class Intervals(NamedTuple):
    """95 % intervals of a row's difference to the first row, `{metric: (low, high)}` for the metrics RECALL_COLUMNS:
    over resampled images, and over resampled images and seeds."""

    images: dict
    seeds: dict


def compare(patterns: list[str], split: str, out: str, benchmark: str = "") -> str:
    """Compares evaluated runs, prints the tables, and writes `compare.md`, `compare.csv` and `compare.html` into `out`.

    `patterns` are workdirs, directories with a `metrics.json`, or globs of these. The others are compared with the row
    of the first, on a split, or on the benchmark of this name (by default that of the first directory, if it has the
    result of one). Returns the tables as Markdown. Raises ConfigError or DataError if there is nothing to compare, or
    if the evaluations have different protocols.
    """
    folder = check_output_directory("--out", out, COMPARISON_FILES)
    if benchmark := benchmark or find_benchmark(patterns):
        tables = compare_benchmarks(patterns, benchmark)
    else:
        tables = compare_evaluations(patterns, split)
    try:
        for ending, text in tables.items():
            write_atomic(folder / f"compare.{ending}", text.encode())
    except OSError as e:
        raise DataError(f"{folder}: cannot be written ({e})") from e
    print0(tables["md"])
    print0(f"wrote {folder}/compare.md, compare.csv and compare.html")
    return tables["md"]


def compare_evaluations(patterns: list[str], split: str) -> dict[str, str]:
    """Compares evaluations of a split; returns the tables by the ending of their file: md, csv, html. Raises as
    `compare` does."""
    runs = [read_evaluation(path, split) for path in expand_patterns(patterns)]
    check_protocols(runs)
    rows = group_by_seed(runs)
    intervals = bootstrap_intervals(rows)
    makers = {"md": to_markdown, "csv": to_csv, "html": to_html}
    return {ending: make(rows, intervals) for ending, make in makers.items()}


def read_evaluation(path: Path, split: str) -> Evaluation:
    """Reads the evaluation of a split that `find_result` finds in `path` or in `path/eval`.

    Raises DataError if it does not exist, cannot be read, or is of another split.
    """
    folder = find_result(path, f"eval/{split}")
    try:
        if (folder / "metrics.json").is_file() and is_benchmark_report(folder / "metrics.json"):
            raise DataError(f"{folder}: is the result of a benchmark; give --benchmark=NAME, or other directories")
        report, ranks = read_results(folder)
    except FileNotFoundError as e:
        raise DataError(f"{e.filename}: no such file; run python eval.py --workdir={path} --split={split}") from None
    protocol, i2t, t2i, caption_image = report["protocol"], *(ranks[key] for key in ("i2t", "t2i", "caption_image"))
    if protocol["split"] != split:
        raise DataError(
            f"{folder}: is of the split {protocol['split']}, not of {split}; give --split={protocol['split']}"
        )
    metrics = {f"{side}.{name}": report[side].get(name) for side in SIDES for name in METRIC_NAMES}
    metrics = {key: float("nan") if value is None else value for key, value in metrics.items()}  # certified: not known
    config = configuration.flatten({k: v for k, v in report["config"].items() if k != "model"})
    captions = np.bincount(caption_image, minlength=len(i2t))
    caption_hits = [np.bincount(caption_image, weights=t2i <= k, minlength=len(i2t)) for k in RECALLS]
    return Evaluation(
        path=path,
        evaluated=report["evaluated"],
        config=config,
        metrics=metrics | {"rsum": report["rsum"]},
        protocol=protocol,
        gallery=(report["data"] or {}).get("gallery"),
        hits=np.stack([*(i2t <= k for k in RECALLS), *caption_hits], 1).astype(float),
        captions=captions,
    )


def check_protocols(runs: list[Evaluation]) -> None:
    """Raises DataError unless all runs were evaluated on the same images and captions, in the same way.

    Prints a note if an earlier version kept no digest of the images and captions; then only their numbers are compared.
    """
    for run in runs[1:]:
        for key in ("split", "images", "captions", "folds", "captions_per_image", "ties"):
            if run.protocol[key] != runs[0].protocol[key]:
                raise DataError(
                    f"{run.path}: {key} is {run.protocol[key]}, but {runs[0].protocol[key]} in {runs[0].path}; only "
                    "evaluations of one protocol can be compared"
                )
        if not np.array_equal(run.captions, runs[0].captions):
            raise DataError(f"{run.path}: its images have other numbers of captions than those of {runs[0].path}")
    known = [run for run in runs if run.gallery]
    for run in known[1:]:
        if run.gallery != known[0].gallery:
            raise DataError(
                f"{run.path}: was evaluated on other images or captions than {known[0].path}; only evaluations on the "
                "same data can be compared"
            )
    if unknown := [run for run in runs if not run.gallery]:
        print0(
            f"note: {unknown[0].path}{' and others' * (len(unknown) > 1)}: evaluated by an earlier version, which did "
            "not keep on which images and captions; evaluate again to have them compared"
        )


def bootstrap_intervals(rows: list[Row], resamples: int = RESAMPLES, seed: int = 0) -> list[Intervals]:
    """Returns each row's 95 % intervals of the difference to the first row.

    All rows see the same resamples of the images (paired bootstrap), while each draws from its own seeds
    (docs/method.md, Eq. 66).
    """
    captions = rows[0].runs[0].captions
    seed_rng = np.random.default_rng((seed, 1))
    draws = next(draw_resamples(len(captions), resamples, seed))  # (R, I)
    queries = np.stack([draws.sum(1)] * 3 + [draws @ captions] * 3, 1)  # images, then captions of a resample: (R, 6)

    def resample_recalls(row: Row) -> tuple[np.ndarray, np.ndarray]:  # (R, 7): of all seeds, and of drawn seeds
        of_seeds = np.stack([100 * (draws @ run.hits) / queries for run in row.runs])  # (S, R, 6)
        shares = draw_shares(len(row.runs), seed_rng, resamples)  # (R, S)
        both = of_seeds.mean(0), np.einsum("rs,srk->rk", shares, of_seeds)
        return tuple(np.concatenate([recalls, recalls.sum(1, keepdims=True)], 1) for recalls in both)

    first, result = resample_recalls(rows[0]), []
    for row in rows:
        recalls = first if row is rows[0] else resample_recalls(row)
        bounds = (percentile_bounds(x - y) for x, y in zip(recalls, first, strict=True))
        result.append(
            Intervals(*(dict(zip(RECALL_COLUMNS, zip(*b.tolist(), strict=True), strict=True)) for b in bounds))
        )
    return result


def to_html(rows: list[Row], intervals: list[Intervals]) -> str:
    """Returns the comparison as a page that needs no other file: a chart and the table."""
    from mefn_jax.reports import charts, figures, pages  # imports matplotlib and jinja2, which only this needs

    chart_rows = [
        {"name": row.name, "interval": interval.images["rsum"] if row is not rows[0] else None}
        | {"means": {k: row.mean(k) for k in RECALL_COLUMNS}, "spreads": {k: row.spread(k) for k in RECALL_COLUMNS}}
        for row, interval in zip(rows, intervals, strict=True)
    ]
    chart = pages.data_uri("png", figures.to_png(charts.comparison_chart(chart_rows)))
    cells = [
        [
            row.name,
            str(len(row.runs)),
            *(_format_cell(row, k) for k in RECALL_COLUMNS),
            *_format_difference(row, rows[0], interval),
        ]
        for row, interval in zip(rows, intervals, strict=True)
    ]
    titles = ["model", "seeds", *([TITLES[f"r{k}"] for k in RECALLS] * 2), TITLES["rsum"], *DIFFERENCES]
    return pages.template("compare.html").render(protocol=protocol_line(rows), chart=chart, titles=titles, cells=cells)


def to_markdown(rows: list[Row], intervals: list[Intervals]) -> str:
    """Returns the tables in both layouts as Markdown, below a line with the protocol."""
    lines = [protocol_line(rows), ""]
    for keys, with_difference in ((RECALL_COLUMNS, True), (PAPER_COLUMNS, False)):
        titles = [
            f"{ {'i2t': 'i2t ', 't2i': 't2i '}.get(k.split('.')[0], '') }{TITLES[k.split('.')[-1]]}" for k in keys
        ]
        header = ["model", "seeds", *titles, *(DIFFERENCES if with_difference else [])]
        lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        for row, interval in zip(rows, intervals, strict=True):
            cells = [row.name.replace("|", "\\|"), str(len(row.runs)), *(_format_cell(row, k) for k in keys)]
            if with_difference:
                cells += _format_difference(row, rows[0], interval)
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def protocol_line(rows: list[Row]) -> str:
    """Returns the protocol of a comparison and the meaning of its numbers, in one line."""
    p = rows[0].runs[0].protocol
    folds = f"{p['folds']} folds, averaged" if p["folds"] > 1 else "one gallery"
    return printable(
        f"{p['split']}: {p['images']} images, {p['captions']} captions ({p['captions_per_image']} per image), {folds}; "
        f"ties {p['ties']}. Mean ± standard deviation over seeds; in brackets 95 % intervals of the difference in rSum "
        f"to the first row (paired bootstrap, {RESAMPLES:,} resamples of the images; then of the images and of each "
        "row's seeds)."
    )


def _format_difference(row: Row, first: Row, intervals: Intervals) -> list[str]:
    """Returns the cells of DIFFERENCES: the difference in rSum to the first row with its interval over images, and the
    interval over images and seeds, which needs several seeds; empty for the first row."""
    if row is first:
        return ["", ""]
    images, seeds = (f"[{low:+.1f}, {high:+.1f}]" for low, high in (i["rsum"] for i in intervals))
    has_seeds = min(len(row.runs), len(first.runs)) > 1
    return [f"{row.mean('rsum') - first.mean('rsum'):+.1f} {images}", seeds if has_seeds else ""]


def _format_cell(row: Row, key: str) -> str:
    """Returns the mean over the seeds, and its standard deviation if there are several; "-" if it is not known."""
    if not np.isfinite(row.mean(key)):
        return "-"
    return f"{row.mean(key):.1f}" + (f" ± {row.spread(key):.1f}" if len(row.runs) > 1 else "")


def to_csv(rows: list[Row], intervals: list[Intervals]) -> str:
    """Returns all numbers as CSV: means, standard deviations, and the intervals of the differences to the first row."""
    return csv_of_rows(rows, intervals, RECALL_COLUMNS)


def define_flags() -> None:
    """Defines the flags of the command."""
    define_split_flag()
    flags.DEFINE_string("benchmark", "", "Compare results on this benchmark, such as eccv, instead of a split.")
    define_path_flag("out", None, "Directory for compare.md, compare.csv and compare.html.", required=True)


def main(patterns: list[str]) -> None:
    """Runs the command, which needs no device."""
    if not patterns:
        raise ConfigError("no runs are named: python eval.py compare DIR DIR --out=DIR")
    compare(patterns, split_from_flags(), flags.FLAGS.out, flags.FLAGS.benchmark)
