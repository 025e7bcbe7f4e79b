"""Evaluation of some pairs by certificate against evaluation of all."""

import numpy as np
import pytest

from mefn_jax.errors import ConfigError
from mefn_jax.evaluation.evaluate import evaluate
from mefn_jax.evaluation.results import read_results
from mefn_jax.evaluation.run import Gallery, TrainedRun
from mefn_jax.reports.compare import compare
from mefn_jax.scoring import certificate

RECALLS = ("r1", "r5", "r10")


def test_certified_evaluation_has_the_recalls_of_all_pairs(runs, tmp_path, monkeypatch, capsys):
    run, gallery = TrainedRun(runs["mate"], "latest"), Gallery(split="val")
    whole = evaluate(run, gallery, str(tmp_path / "whole"))
    same = evaluate(run, gallery, str(tmp_path / "same"), certified=True)
    assert "more than half of all pairs can be among the first results; all pairs are scored" in capsys.readouterr().out
    assert same.report["i2t"] == whole.report["i2t"]
    monkeypatch.setattr(certificate, "MOST", 1.0)
    first = evaluate(run, gallery, str(tmp_path / "first"), certified=True)
    printed = capsys.readouterr().out
    assert "certified: the first 10 results of every query are those of all pairs" in printed
    report, ranks = read_results(first.folder)
    for side in ("i2t", "t2i"):
        assert report[side] == {k: whole.report[side][k] for k in RECALLS}
        np.testing.assert_array_equal(ranks[side], np.minimum(whole.ranks[side], 11))
        np.testing.assert_array_equal(ranks[f"{side}_top"], whole.ranks[f"{side}_top"])
    assert report["rsum"] == whole.report["rsum"]
    shares = report["certified"]
    assert 0 < shares["captions_share"] + shares["images_share"] <= 1
    row = next(line for line in printed.splitlines() if line.startswith("mate (step 2)"))
    assert row.split().count("-") == 6
    table = compare([str(tmp_path / "first"), str(tmp_path / "whole")], "val", str(tmp_path / "compared"))
    assert table.count("mate") >= 2
    assert "nan" not in table


def test_certified_evaluation_refuses_what_needs_all_scores(runs, tmp_path):
    run = TrainedRun(runs["mate"], "latest")
    for options in ({"save_scores": str(tmp_path / "scores.npy")}, {"rerank": "2"}, {"transductive": "csls"}):
        with pytest.raises(ConfigError, match=r"--rerank|leave out --folds"):
            evaluate(run, Gallery(split="val"), certified=True, **options)
    with pytest.raises(ConfigError, match="--certified: the matcher of model=vsepp has no bound"):
        evaluate(TrainedRun(runs["vsepp"], "latest"), Gallery(split="val"), certified=True)
