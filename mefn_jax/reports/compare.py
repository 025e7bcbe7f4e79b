"""One table of many evaluated runs: `eval.py --compare=DIR,DIR,... --out=DIR` (DESIGN.md 8).

Runs whose configurations differ in nothing but the seed are one row: the mean over seeds and its spread. Each row's
differences to the first come with a paired bootstrap interval from the runs' `ranks.npz`: images are resampled, with
their captions, and within a resample a row is the average of its seeds.
"""

import csv
import dataclasses
import glob
import io
import json
from pathlib import Path

import numpy as np

from mefn_jax import config as configuration
from mefn_jax.data.split import SPLIT_ALIASES
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.metrics import RECALLS
from mefn_jax.runtime.console import print0
from mefn_jax.runtime.storage import resolve_directory, write_atomic

RESAMPLES = 10_000
SIDES = ("i2t", "t2i")
RECALL_COLUMNS = [f"{side}.r{k}" for side in SIDES for k in RECALLS] + ["rsum"]  # the layout of the field's tables
PAPER_COLUMNS = [f"{side}.{m}" for side in SIDES for m in ("r1", "r5", "map")]  # that of the MEFN paper's Tables 1 to 3
TITLES = {"r1": "R@1", "r5": "R@5", "r10": "R@10", "map": "mAP", "rsum": "rSum"}
# What of a configuration says where and how fast a run went, not what was trained.
IGNORED_KEYS = ("train.seed", "data.threads", "data.workers", "train.log_every", "train.save_every", "eval.")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluated run: where it is, its flat configuration and metrics, and what it ranked.

    Attributes:
        hits: float64 `(I, 6)`: of each image, whether it is found in the first 1, 5, 10 by image to text, and how
            many of its captions find it in the first 1, 5, 10.
        captions: int64 `(I,)`, of each image.
    """

    path: Path
    config: dict
    metrics: dict
    protocol: dict
    hits: np.ndarray
    captions: np.ndarray


@dataclasses.dataclass(frozen=True)
class Row:
    """Runs that differ in their seeds alone, under one name."""

    name: str
    runs: list[Evaluation]

    def mean(self, key: str) -> float:
        """The mean of a metric over the seeds."""
        return float(np.mean([run.metrics[key] for run in self.runs]))

    def spread(self, key: str) -> float:
        """The standard deviation over the seeds, of a sample; NaN for one seed."""
        values = [run.metrics[key] for run in self.runs]
        return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def compare(patterns: list[str], split: str, out: str) -> str:
    """Compares evaluated runs, prints the tables and writes `compare.md`, `compare.csv` and
    `compare.html` into `out`.

    `patterns` are workdirs, or directories with a `metrics.json`, or globs of these; the first one's row is what the
    others are compared with. Raises ConfigError or DataError where there is nothing to compare.
    """
    split, out = SPLIT_ALIASES.get(split, split), resolve_directory("--out", out)
    runs = [read_evaluation(path, split) for path in expand_patterns(patterns)]
    check_protocols(runs)
    rows = group_by_seed(runs)
    intervals = bootstrap_intervals(rows)
    text = to_markdown(rows, intervals)
    try:
        write_atomic(out / "compare.md", text.encode())
        write_atomic(out / "compare.csv", to_csv(rows, intervals).encode())
        write_atomic(out / "compare.html", to_html(rows, intervals).encode())
    except OSError as e:
        raise DataError(f"{out}: cannot be written ({e})") from e
    print0(text)
    print0(f"wrote {out}/compare.md, compare.csv and compare.html")
    return text


def expand_patterns(patterns: list[str]) -> list[Path]:
    """The directories that the patterns name, in their order, each once."""
    paths = []
    for pattern in patterns:
        matches = [Path(p) for p in sorted(glob.glob(pattern)) if Path(p).is_dir()]
        if not matches:
            raise ConfigError(f"--compare: {pattern}: no such directory")
        paths += [path for path in matches if path not in paths]
    return paths


def read_evaluation(path: Path, split: str) -> Evaluation:
    """One run's evaluation of a split: in `path` itself or in `path/eval/<split>`. Raises DataError without one."""
    folder = path if (path / "metrics.json").is_file() else path / "eval" / split
    try:
        report = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        with np.load(folder / "ranks.npz", allow_pickle=False) as file:
            i2t, t2i, owner = file["i2t"], file["t2i"], file["caption_image"]
        metrics = configuration.flatten({side: report[side] for side in SIDES}) | {"rsum": report["rsum"]}
        config, protocol = configuration.flatten(report["config"]), report["protocol"]
    except FileNotFoundError as e:
        raise DataError(f"{e.filename}: no such file; run python eval.py --workdir={path} --split={split}") from None
    except (KeyError, ValueError, OSError) as e:
        raise DataError(f"{folder}: cannot be read as an evaluation ({e}); evaluate the run again") from None
    if protocol["split"] != split:
        raise DataError(f"{folder}: is of the split {protocol['split']}, not of {split}; give --split")
    captions = np.bincount(owner, minlength=len(i2t))
    inside = [np.bincount(owner, weights=t2i <= k, minlength=len(i2t)) for k in RECALLS]
    hits = np.stack([*(i2t <= k for k in RECALLS), *inside], 1).astype(float)
    return Evaluation(path, config, metrics, protocol, hits, captions)


def check_protocols(runs: list[Evaluation]) -> None:
    """Raises DataError if two runs were not evaluated on the same images and captions, in the same way."""
    for run in runs[1:]:
        for key in ("split", "images", "captions", "folds", "captions_per_image", "ties"):
            if run.protocol[key] != runs[0].protocol[key]:
                raise DataError(
                    f"{run.path}: {key} is {run.protocol[key]}, but {runs[0].protocol[key]} in {runs[0].path}; only "
                    "evaluations of one protocol can be compared"
                )
        if not np.array_equal(run.captions, runs[0].captions):
            raise DataError(f"{run.path}: its images have other numbers of captions than those of {runs[0].path}")


def group_by_seed(runs: list[Evaluation]) -> list[Row]:
    """Rows of runs whose configurations differ in the seed alone, in the order in which they come first."""
    groups = {}
    for run in runs:
        groups.setdefault(json.dumps(config_without_seed(run), sort_keys=True), []).append(run)
    groups = list(groups.values())
    return [Row(name, group) for name, group in zip(row_names([g[0] for g in groups]), groups, strict=True)]


def config_without_seed(run: Evaluation) -> dict:
    """The configuration without the seed and what does not change the result."""
    return {k: v for k, v in run.config.items() if not k.startswith(IGNORED_KEYS)}


def row_names(firsts: list[Evaluation]) -> list[str]:
    """The rows' names: the model, and where several have one model, the options in which those differ."""
    result = []
    for run in firsts:
        same = [config_without_seed(other) for other in firsts if other.config["model"] == run.config["model"]]
        keys = sorted({k for other in same for k in other | same[0] if other.get(k) != same[0].get(k)})
        options = ", ".join(f"{k}={run.config.get(k)}" for k in keys)
        result.append(f"{run.config['model']} ({options})" if options else run.config["model"])
    return result


def bootstrap_intervals(rows: list[Row], resamples: int = RESAMPLES, seed: int = 0) -> list[dict]:
    """Each row's difference to the first, `{metric: (low, high)}` of the 95 % interval, of the field's metrics."""
    captions = rows[0].runs[0].captions
    rng = np.random.default_rng(seed)
    # How often each image is drawn, in each resample.
    drawn = rng.multinomial(len(captions), np.full(len(captions), 1 / len(captions)), resamples).astype(float)
    size = np.stack([drawn.sum(1)] * 3 + [drawn @ captions] * 3, 1)  # (R, 6)

    def resampled(row: Row) -> np.ndarray:  # (R, 7)
        recalls = 100 * np.mean([drawn @ run.hits for run in row.runs], 0) / size
        return np.concatenate([recalls, recalls.sum(1, keepdims=True)], 1)

    first = resampled(rows[0])
    intervals = [np.percentile(resampled(row) - first, (2.5, 97.5), axis=0) for row in rows]
    return [dict(zip(RECALL_COLUMNS, zip(*i.tolist(), strict=True), strict=True)) for i in intervals]


def to_html(rows: list[Row], intervals: list[dict]) -> str:
    """The comparison as a page that needs nothing beside itself: bars with intervals, and the table."""
    from mefn_jax.reports import charts, figures, pages  # matplotlib and jinja2, which only this needs

    bars = [
        {"name": row.name, "interval": interval["rsum"] if row is not rows[0] else None}
        | {"means": {k: row.mean(k) for k in RECALL_COLUMNS}, "spreads": {k: row.spread(k) for k in RECALL_COLUMNS}}
        for row, interval in zip(rows, intervals, strict=True)
    ]
    picture = pages.data_uri("png", figures.to_png(charts.comparison_chart(bars)))
    cells = [
        [
            row.name,
            str(len(row.runs)),
            *(_cell(row, k) for k in RECALL_COLUMNS),
            _difference_to_first(row, rows[0], interval),
        ]
        for row, interval in zip(rows, intervals, strict=True)
    ]
    titles = ["model", "seeds", *([TITLES[f"r{k}"] for k in RECALLS] * 2), TITLES["rsum"], "rSum to the first"]
    return pages.template("compare.html").render(said=protocol_line(rows), picture=picture, titles=titles, cells=cells)


def to_markdown(rows: list[Row], intervals: list[dict]) -> str:
    """Both layouts as Markdown tables, under a line that says what they are of."""
    lines = [protocol_line(rows), ""]
    for keys, with_difference in ((RECALL_COLUMNS, True), (PAPER_COLUMNS, False)):
        titles = [
            f"{ {'i2t': 'i2t ', 't2i': 't2i '}.get(k.split('.')[0], '') }{TITLES[k.split('.')[-1]]}" for k in keys
        ]
        heads = ["model", "seeds", *titles, *(["rSum to the first"] if with_difference else [])]
        lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for row, interval in zip(rows, intervals, strict=True):
            cells = [row.name, str(len(row.runs)), *(_cell(row, k) for k in keys)]
            if with_difference:
                cells.append(_difference_to_first(row, rows[0], interval))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def protocol_line(rows: list[Row]) -> str:
    """What a comparison is of."""
    p = rows[0].runs[0].protocol
    folds = f"{p['folds']} folds, averaged" if p["folds"] > 1 else "one gallery"
    return (
        f"{p['split']}: {p['images']} images, {p['captions']} captions ({p['captions_per_image']} an image), {folds}; "
        f"ties {p['ties']}. Mean ± standard deviation over seeds; in brackets the 95 % interval of the difference of "
        f"rSum to the first row (paired bootstrap, {RESAMPLES:,} resamples of the images)."
    )


def _difference_to_first(row: Row, first: Row, interval: dict) -> str:
    """The difference of rSum to the first row's, with its interval; nothing in the first."""
    low, high = interval["rsum"]
    return "" if row is first else f"{row.mean('rsum') - first.mean('rsum'):+.1f} [{low:+.1f}, {high:+.1f}]"


def _cell(row: Row, key: str) -> str:
    return f"{row.mean(key):.1f}" + (f" ± {row.spread(key):.1f}" if len(row.runs) > 1 else "")


def to_csv(rows: list[Row], intervals: list[dict]) -> str:
    """All numbers as CSV, a line a row: mean, spread, and the interval of the difference to the first row."""
    keys = list(rows[0].runs[0].metrics)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    ends = [f"{k}.{end}" for k in RECALL_COLUMNS for end in ("low", "high")]
    writer.writerow(["model", "seeds", "runs", *(f"{k}.{what}" for k in keys for what in ("mean", "std")), *ends])
    for row, interval in zip(rows, intervals, strict=True):
        numbers = [f"{value:.6g}" for k in keys for value in (row.mean(k), row.spread(k))]
        bounds = [f"{bound:.6g}" for k in RECALL_COLUMNS for bound in interval[k]]
        seeds = [str(run.config.get("train.seed", "")) for run in row.runs]
        writer.writerow([row.name, " ".join(seeds), " ".join(str(r.path) for r in row.runs), *numbers, *bounds])
    return out.getvalue()
