"""The table of many runs: grouping, means, the bootstrap, and evaluations that cannot be compared."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest

from mefn_jax import metrics
from mefn_jax.errors import ConfigError, DataError
from mefn_jax.reports import compare
from mefn_jax.reports.rows import find_result

IMAGES, CAPTIONS_PER_IMAGE = 40, np.tile([5, 6], 20)
IMAGE_INDEX = np.repeat(np.arange(IMAGES), CAPTIONS_PER_IMAGE)


def write_run(folder, model, seed, skill, split="val", **config):
    """Writes the evaluation of a run whose scores are noise, plus `skill` for positive pairs; returns its metrics."""
    rng = np.random.default_rng([seed, len(model)])
    scores = rng.normal(size=(IMAGES, len(IMAGE_INDEX))) + skill * (np.arange(IMAGES)[:, None] == IMAGE_INDEX)
    positive = scores[IMAGE_INDEX, np.arange(len(IMAGE_INDEX))]
    negative = np.arange(IMAGES)[:, None] != IMAGE_INDEX
    n_t2i = np.sum(negative & (scores >= positive), 0)
    n_i2t = np.array([np.sum(negative[i] & (scores[i] >= s)) for i, s in zip(IMAGE_INDEX, positive, strict=True)])
    result = metrics.retrieval_metrics(n_i2t, n_t2i, IMAGE_INDEX)
    i2t, t2i = metrics.best_ranks(n_i2t, n_t2i, IMAGE_INDEX)
    protocol = {
        "split": split,
        "images": IMAGES,
        "captions": len(IMAGE_INDEX),
        "folds": 1,
        "captions_per_image": "5 to 6",
    }
    settings = {"model": model, "train": {"seed": seed, "log_every": seed}, "matcher": {"entropy": "shannon"} | config}
    report = {"format": 1, "step": 1, "evaluated": model} | result
    report |= {"protocol": protocol | {"ties": "against the model"}, "config": settings}
    out = folder / "eval" / split
    out.mkdir(parents=True)
    (out / "metrics.json").write_text(json.dumps(report))
    np.savez(out / "ranks.npz", i2t=i2t, t2i=t2i, caption_image=IMAGE_INDEX)
    return result


@pytest.fixture
def runs(tmp_path):
    metrics_of = {}
    for model, skill, options in (("mefn", 3.0, {}), ("mefn", 2.6, {"entropy": "gaussian"}), ("vsepp", 2.0, {})):
        name = model + options.get("entropy", "")
        metrics_of[name] = [write_run(tmp_path / name / str(s), model, s, skill, **options) for s in (0, 1, 2)]
    return tmp_path, metrics_of


def test_compare_groups_runs_by_seed(runs, capsys):
    root, metrics_of = runs
    compare.compare([f"{root}/mefn/*", f"{root}/*/*"], "val", root / "out")
    with (root / "out" / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == [
        "mefn (matcher.entropy=shannon)",
        "mefn (matcher.entropy=gaussian)",
        "vsepp",
    ]
    for row, name in zip(rows, ("mefn", "mefngaussian", "vsepp"), strict=True):
        assert row["seeds"] == "0 1 2"
        for key, value in (("rsum", "rsum"), ("t2i.r1", ("t2i", "r1")), ("i2t.map", ("i2t", "map"))):
            found = [r[value] if key == "rsum" else r[value[0]][value[1]] for r in metrics_of[name]]
            assert float(row[f"{key}.mean"]) == pytest.approx(np.mean(found), rel=1e-5)
            assert float(row[f"{key}.std"]) == pytest.approx(np.std(found, ddof=1), rel=1e-5)
    text = (root / "out" / "compare.md").read_text()
    assert text in capsys.readouterr().out
    field, paper = text.split("\n\n")[1:3]
    assert field.splitlines()[0].startswith("| model | seeds | i2t R@1 | i2t R@5 | i2t R@10 | t2i R@1")
    assert paper.splitlines()[0] == ("| model | seeds | i2t R@1 | i2t R@5 | i2t mAP | t2i R@1 | t2i R@5 | t2i mAP |")
    assert "95 % interval" in text
    difference = np.mean([r["rsum"] for r in metrics_of["vsepp"]]) - np.mean([r["rsum"] for r in metrics_of["mefn"]])
    assert f"| {difference:+.1f} [" in field.splitlines()[-1]
    assert field.splitlines()[-1].count("[") == 2


def test_bootstrap_intervals_equal_plain_bootstrap(runs):
    """Images are drawn one by one with their captions, and the seeds of a row, or drawn ones, are averaged."""
    root, _ = runs
    rows = compare.group_by_seed(
        [compare.read_evaluation(p, "val") for p in compare.expand_patterns([f"{root}/mefn/*", f"{root}/vsepp/*"])]
    )
    intervals = compare.bootstrap_intervals(rows, resamples=4000)
    rng = np.random.default_rng(1)
    ranks_of = {run.path: dict(np.load(run.path / "eval" / "val" / "ranks.npz")) for row in rows for run in row.runs}

    def rsum(run, drawn):
        ranks = ranks_of[run.path]
        t2i = np.concatenate([ranks["t2i"][k == IMAGE_INDEX] for k in drawn])
        return sum(100 * np.mean(x <= k) for x in (ranks["i2t"][drawn], t2i) for k in (1, 5, 10))

    differences = {"images": [], "seeds": []}
    for _ in range(400):
        drawn = rng.integers(0, IMAGES, IMAGES)
        of_seeds = [[rsum(run, drawn) for run in row.runs] for row in rows]
        differences["images"].append(np.mean(of_seeds[1]) - np.mean(of_seeds[0]))
        chosen = [np.mean([x[rng.integers(len(x))] for _ in x]) for x in of_seeds]
        differences["seeds"].append(chosen[1] - chosen[0])
    for kind, values in differences.items():
        low, high = getattr(intervals[1], kind)["rsum"]
        assert (low, high) == pytest.approx(tuple(np.percentile(values, (2.5, 97.5))), abs=8.0)
        assert low < rows[1].mean("rsum") - rows[0].mean("rsum") < high < 0
    assert intervals[0].images["rsum"] == intervals[0].seeds["rsum"] == (0.0, 0.0)


def test_bootstrap_interval_over_seeds_equals_enumeration(runs):
    """All images are alike here, so that the seeds alone vary: of the 27 draws of three seeds, one takes the lowest
    three times and one the highest, each with a chance above 2.5 %."""
    root, _ = runs
    run = compare.read_evaluation(root / "vsepp" / "0", "val")
    alike = np.stack([np.ones(len(run.captions))] * 3 + [run.captions] * 3, 1)
    seeds = [dataclasses.replace(run, hits=factor * alike) for factor in (0.5, 0.7, 0.8)]
    first, second = compare.bootstrap_intervals([compare.Row("a", seeds[1:2]), compare.Row("b", seeds)])
    assert first.seeds == first.images
    mean = 600 * (np.mean([0.5, 0.7, 0.8]) - 0.7)
    assert second.images["rsum"] == pytest.approx((mean, mean))
    assert second.seeds["rsum"] == pytest.approx((600 * (0.5 - 0.7), 600 * (0.8 - 0.7)))
    assert second.seeds["t2i.r5"] == pytest.approx((-20, 10))


def test_compare_reads_evaluation_folder_as_row(runs):
    root, metrics_of = runs
    rows = compare.group_by_seed(
        [compare.read_evaluation(p, "val") for p in compare.expand_patterns([f"{root}/vsepp/0/eval/val"])]
    )
    assert (rows[0].name, len(rows[0].runs)) == ("vsepp", 1)
    assert np.isnan(rows[0].spread("rsum"))
    assert rows[0].mean("rsum") == metrics_of["vsepp"][0]["rsum"]


def test_compare_notes_evaluations_of_one_seed_in_a_row(runs, capsys):
    root, _ = runs
    shutil.copytree(root / "vsepp" / "0", root / "vsepp" / "again")
    compare.compare([f"{root}/vsepp/*"], "val", root / "out")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2  # the other one says that the galleries have no digests
    assert notes[1].startswith(f"note: {root}/vsepp/again and {root}/vsepp/0 have the same options and the same ")
    assert "train.seed=0, but count as two seeds" in notes[1]


def test_find_result_takes_averaged_parameters_where_there_are_no_others(tmp_path):
    assert find_result(tmp_path, "eval/val") == tmp_path / "eval" / "val"
    for name in ("eval/val_ema", "eval/val", ""):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "metrics.json").touch()
        assert find_result(tmp_path, "eval/val") == tmp_path / name


def test_compare_reads_files_of_earlier_versions_as_the_same_system(runs):
    """Earlier versions wrote no `evaluated`, and the averaged parameters into the configuration."""
    root, _ = runs
    for seed, change in enumerate(
        ({"evaluated": "mefn, averaged parameters"}, {"config": {"evaluated": "averaged parameters"}})
    ):
        path = root / "mefn" / str(seed) / "eval" / "val" / "metrics.json"
        report = json.loads(path.read_text())
        del report["format"], report["evaluated"]
        config = report["config"] | change.get("config", {})
        path.write_text(json.dumps(report | change | {"config": config}))
    found = [compare.read_evaluation(root / "mefn" / str(seed), "val") for seed in (0, 1, 2)]
    assert [run.evaluated for run in found] == [*["mefn, averaged parameters"] * 2, "mefn"]
    assert [len(row.runs) for row in compare.group_by_seed(found)] == [2, 1]


def test_compare_refuses_evaluations_that_do_not_match(runs):
    root, _ = runs
    with pytest.raises(ConfigError, match="nowhere: no such directory"):
        compare.expand_patterns([f"{root}/nowhere"])
    with pytest.raises(DataError, match=r"no such file; run python eval.py --workdir=.*vsepp/0 --split=test"):
        compare.compare([f"{root}/vsepp/0"], "test", root / "out")
    with pytest.raises(DataError, match="is of the split val, not of test"):
        compare.compare([f"{root}/vsepp/0/eval/val"], "test", root / "out")
    path = root / "vsepp" / "1" / "eval" / "val" / "metrics.json"
    report = json.loads(path.read_text())
    report["protocol"]["folds"] = 5
    path.write_text(json.dumps(report))
    with pytest.raises(DataError, match="folds is 5, but 1 in"):
        compare.compare([f"{root}/vsepp/*"], "val", root / "out")
    for content, message in (
        ("{}", "cannot be read as an evaluation"),
        ('{"format": 1}', "the key 'evaluated' is missing.*; cannot be read as an evaluation: evaluate"),
        ("[]", "expected an object whose 'format' is a number"),
        ('{"format": 3}', "has format 3, written by a newer version"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            compare.compare([f"{root}/vsepp/*"], "val", root / "out")
    assert not (root / "out").exists()


def set_report(root, run, **values):
    """Sets values of the report of a run."""
    path = root / run / "eval" / "val" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_compare_refuses_evaluations_of_other_data_with_equal_numbers(runs, capsys):
    root, _ = runs
    for seed in (0, 1, 2):
        set_report(root, f"vsepp/{seed}", format=2, data={"gallery": "abc"})
    compare.compare([f"{root}/vsepp/*"], "val", root / "out")
    assert "note:" not in capsys.readouterr().out
    compare.compare([f"{root}/vsepp/*", f"{root}/mefn/*"], "val", root / "out")
    assert "mefn/0 and others: evaluated by an earlier version" in capsys.readouterr().out
    set_report(root, "mefn/1", format=2, data={"gallery": "xyz"})
    with pytest.raises(DataError, match=r"mefn/1: was evaluated on other images or captions than .*vsepp/0"):
        compare.compare([f"{root}/vsepp/*", f"{root}/mefn/*"], "val", root / "out")


FORMULAS = ['=cmd|"/c calc"!A1', "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1", " =1", "\x00=1", "a\n=1"]


def test_csv_has_no_formula_and_one_line_a_row(runs):
    root, _ = runs
    found = [compare.read_evaluation(root / "vsepp" / str(seed), "val") for seed in (0, 1)]
    for name in FORMULAS:
        rows = [compare.Row(name, found[:1]), compare.Row("vsepp", found[1:])]
        text = compare.to_csv(rows, compare.bootstrap_intervals(rows, resamples=10))
        first, second = csv.DictReader(text.splitlines())
        assert first["model"][0] not in "=+-@\t\r\n\uff1d\uff0b\uff0d\uff20 \x00", name
        assert second["model"] == "vsepp"
        assert float(second["rsum.low"]) <= float(second["rsum.high"])  # numbers are not escaped


def test_markdown_table_keeps_its_columns(runs):
    root, _ = runs
    set_report(root, "vsepp/0", evaluated="a|b\n\ud800")
    rows = compare.group_by_seed([compare.read_evaluation(root / "vsepp" / "0", "val")])
    text = compare.to_markdown(rows, compare.bootstrap_intervals(rows, resamples=10))
    assert "| a\\|b\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} |" in text


def test_compare_replaces_its_own_files_alone(runs):
    root, _ = runs
    for _ in range(2):
        compare.compare([f"{root}/vsepp/*"], "val", root / "out")
    for name in ("compare.md", "compare.csv", "compare.html"):
        content = (root / "out" / name).read_bytes()
        (root / "out" / name).write_text("mine")
        with pytest.raises(ConfigError, match=f"{name}: exists and was not written by this command"):
            compare.compare([f"{root}/vsepp/*"], "val", root / "out")
        assert (root / "out" / name).read_text() == "mine"
        (root / "out" / name).write_bytes(content)
