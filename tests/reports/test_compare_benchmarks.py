"""Comparison of models on one benchmark: paired intervals against a plain bootstrap, and results that do not match."""

import csv
import json
import shutil

import numpy as np
import pytest

from mefn_jax.benchmarks.measures import Measure, combine_measures, mean_measure
from mefn_jax.benchmarks.results import read_benchmark, write_benchmark
from mefn_jax.benchmarks.table import make_entries
from mefn_jax.errors import DataError
from mefn_jax.reports import compare, compare_benchmarks
from mefn_jax.reports.rows import expand_patterns, group_by_seed

UNITS, QUERIES = 40, 160
UNIT = np.random.default_rng(0).integers(0, UNITS, QUERIES)
RATINGS = np.random.default_rng(1).integers(1, 5, (QUERIES, 3)).astype(float)


def make_measures(seed, skill):
    """Measures of a model: successes with probability `skill`, their mean, tau of scores that follow the ratings."""
    rng = np.random.default_rng(seed)
    success = (rng.random(QUERIES) < skill).astype(float)
    parts = [mean_measure(row, "accuracy", success[k::2], UNIT[k::2], UNITS, 50.0) for k, row in enumerate("ab")]
    tau = {
        "scores": skill * RATINGS.mean(1) + rng.normal(size=QUERIES),
        "ratings": RATINGS,
        "unit": UNIT,
        "factor": 100.0,
    }
    return [
        *parts,
        combine_measures("mean", "accuracy", parts, 0.5, 50.0),
        Measure("all", "tau_c", "tau_c", tau, 480, 0.0),
    ]


def write_result(folder, model, seed, skill, name="sugar_crepe", digest="same"):
    measures = make_measures([seed, len(model)], skill)
    report = {
        "benchmark": name,
        "evaluated": model,
        "config": {"model": model, "train": {"seed": seed}},
        "protocol": {"cases": QUERIES, "images": UNITS, "ties": "never a success"},
        "measures": make_entries(measures, UNITS),
        "units": UNITS,
        "unit": "images",
        "data": {"digest": digest},
    }
    write_benchmark(folder, report, measures)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Results of two models with three seeds each."""
    root = tmp_path_factory.mktemp("written")
    for model, skill in (("vsepp", 0.5), ("mefn", 0.8)):
        for seed in range(3):
            write_result(root / model / str(seed) / "benchmarks" / "sugar_crepe", model, seed, skill)
    return root


@pytest.fixture
def results(written, tmp_path, monkeypatch):
    """A copy of these results, to be changed; comparisons of it take fewer resamples."""
    monkeypatch.setattr(compare_benchmarks, "RESAMPLES", 2000)
    return shutil.copytree(written, tmp_path / "results")


def test_compare_joins_the_benchmarks_of_models(results, capsys):
    text = compare.compare([f"{results}/vsepp/*", f"{results}/mefn/*"], "test", results / "out", "sugar_crepe")
    assert "| measure | chance | vsepp | mefn | minus the first |" in text
    assert text in capsys.readouterr().out
    with (results / "out" / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["seeds"]) for row in rows] == [("vsepp", "0 1 2"), ("mefn", "0 1 2")]
    values = [
        read_benchmark(results / "mefn" / str(seed) / "benchmarks" / "sugar_crepe")[0]["measures"][2]["value"]
        for seed in range(3)
    ]
    assert float(rows[1]["mean.accuracy.mean"]) == pytest.approx(np.mean(values), abs=1e-3)
    assert float(rows[1]["mean.accuracy.std"]) == pytest.approx(np.std(values, ddof=1), abs=1e-3)
    assert float(rows[1]["mean.accuracy.low"]) > 0
    page = (results / "out" / "compare.html").read_text()
    assert "default-src 'none'" in page
    assert "<td>a, accuracy</td>" in page
    compare.compare([f"{results}/mefn/0"], "test", results / "out", "sugar_crepe")  # replaces its own files


def test_intervals_of_differences_equal_plain_bootstrap(results):
    patterns = [f"{results}/vsepp/*", f"{results}/mefn/*"]
    rows = group_by_seed([compare_benchmarks.read_run(path, "sugar_crepe") for path in expand_patterns(patterns)])
    differences = compare_benchmarks.resample_differences(rows)
    rng, samples = np.random.default_rng(3), {"units": [], "seeds": []}
    for _ in range(500):
        weights = np.bincount(rng.integers(0, UNITS, UNITS), minlength=UNITS)[None].astype(float)
        values = [[[m.compute(weights)[0] for m in run.measures.values()] for run in row.runs] for row in rows]
        samples["units"].append(np.mean(values[1], 0) - np.mean(values[0], 0))
        drawn = [np.mean(np.array(x)[rng.integers(0, 3, 3)], 0) for x in values]
        samples["seeds"].append(drawn[1] - drawn[0])
    for kind, sample in samples.items():
        spread = np.std(sample, 0)
        for k, name in enumerate(rows[0].runs[0].measures):
            low, high = getattr(differences[1], kind)[name]
            expected = np.percentile(np.array(sample)[:, k], (2.5, 97.5))
            assert (low, high) == pytest.approx(tuple(expected), abs=0.5 * spread[k]), (kind, name)
            assert getattr(differences[0], kind)[name] == (0.0, 0.0)


def test_compare_takes_directories_of_results(results):
    paths = [str(results / model / "0" / "benchmarks" / "sugar_crepe") for model in ("mefn", "vsepp")]
    assert compare.compare(paths, "test", results / "out").startswith("sugar_crepe: 160 cases, 40 images")


def change_report(results, **fields):
    path = results / "mefn" / "0" / "benchmarks" / "sugar_crepe" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": {"digest": "other"}}, "was scored on other images, captions or cases than"),
        ({"benchmark": "foil"}, "is of the benchmark foil, not of sugar_crepe"),
        ({"format": 9}, "has format 9, written by a newer version"),
        ({"measures": []}, "has other measures than"),
        ({"measures": [{"row": "a"}]}, r"measures\[0\]: the key 'column' is missing"),
        ({"units": 7}, "measures.npz: cannot be read as measures"),
    ],
)
def test_results_that_do_not_match_are_refused(results, fields, message):
    change_report(results, **fields)
    with pytest.raises(DataError, match=message):
        compare.compare([f"{results}/vsepp/*", f"{results}/mefn/*"], "test", results / "out", "sugar_crepe")


def test_a_changed_value_or_a_missing_file_is_refused(results):
    folder = results / "mefn" / "0" / "benchmarks" / "sugar_crepe"
    measures = json.loads((folder / "metrics.json").read_text())["measures"]
    measures[0]["value"] += 1
    change_report(results, measures=measures)
    with pytest.raises(DataError, match=r"a.accuracy is .*, but .* in metrics.json; run the benchmark again"):
        compare.compare([f"{results}/mefn/0"], "test", results / "out", "sugar_crepe")
    (folder / "metrics.json").unlink()
    with pytest.raises(DataError, match=r"no such file; run python eval.py benchmark sugar_crepe --workdir=.*/mefn/0"):
        compare.compare([f"{results}/mefn/0"], "test", results / "out", "sugar_crepe")


def test_evaluations_of_a_split_and_benchmarks_are_not_mixed(results):
    folder = results / "mefn" / "0" / "benchmarks" / "sugar_crepe"
    (results / "mefn" / "0" / "eval" / "test").mkdir(parents=True)
    for path in folder.iterdir():
        (results / "mefn" / "0" / "eval" / "test" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="is the result of a benchmark; give --benchmark=NAME"):
        compare.compare([f"{results}/mefn/0"], "test", results / "out")
    (folder / "metrics.json").write_text('{"i2t": 1}')
    with pytest.raises(DataError, match="is the evaluation of a split, not of the benchmark sugar_crepe"):
        compare.compare([f"{results}/mefn/0"], "test", results / "out", "sugar_crepe")
