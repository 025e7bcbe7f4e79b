"""Measures against loops over resampled units, and measures that are undefined."""

import numpy as np
import pytest
from scipy.stats import kendalltau

from mefn_jax.benchmarks import measures
from mefn_jax.benchmarks.measures import Measure, combine_measures, compute_intervals, compute_value, mean_measure
from mefn_jax.benchmarks.table import format_measure, make_entries
from mefn_jax.errors import DataError

UNITS = 12


@pytest.fixture
def example():
    """Values of 50 queries, the unit and the group of each, and one measure of every statistic."""
    rng = np.random.default_rng(0)
    values, unit = rng.integers(0, 2, 50).astype(float), rng.integers(0, UNITS, 50)
    first, second = (
        mean_measure(name, "r1", values[part], unit[part], UNITS)
        for name, part in (("a", slice(20)), ("b", slice(20, 50)))
    )
    group = rng.integers(0, 3, UNITS)
    of_units = rng.random(UNITS)
    ratings = rng.integers(1, 5, (50, 2)).astype(float)
    tau = {"scores": values + rng.integers(0, 3, 50), "ratings": ratings, "unit": unit, "factor": 100.0}
    all_measures = [
        first,
        combine_measures("both", "r1", [first, second], 0.5),
        Measure("all", "per_class", "group_mean", {"values": of_units, "group": group}, UNITS),
        Measure("all", "tau_b", "tau_b", tau, 100),
        Measure("all", "tau_c", "tau_c", tau, 100),
    ]

    def loop(drawn):
        parts = [np.concatenate([values[part][unit[part] == k] for k in drawn]) for part in (slice(20), slice(20, 50))]
        means = [100 * np.mean(part) for part in parts]
        groups = [np.mean([of_units[k] for k in drawn if group[k] == g]) for g in sorted({group[k] for k in drawn})]
        rows = np.concatenate([np.flatnonzero(unit == k) for k in drawn])
        scores = np.repeat(tau["scores"][rows], 2)
        taus = [100 * kendalltau(scores, ratings[rows].reshape(-1), variant=v).statistic for v in "bc"]
        return [means[0], np.mean(means), np.mean(groups), *taus]

    return all_measures, loop


def test_measures_of_resampled_units_equal_loops(example):
    all_measures, loop = example
    rng = np.random.default_rng(1)
    for _ in range(5):
        drawn = rng.integers(0, UNITS, UNITS)
        weights = np.bincount(drawn, minlength=UNITS)[None].astype(float)
        np.testing.assert_allclose([m.compute(weights)[0] for m in all_measures], loop(drawn), atol=1e-10)
    np.testing.assert_allclose([compute_value(m, UNITS) for m in all_measures], loop(np.arange(UNITS)), atol=1e-10)


def test_intervals_equal_plain_bootstrap(example, monkeypatch):
    all_measures, loop = example
    monkeypatch.setattr(measures, "RESAMPLES_AT_ONCE", 300)
    rng = np.random.default_rng(2)
    samples = np.array([loop(rng.integers(0, UNITS, UNITS)) for _ in range(600)])
    intervals = compute_intervals(all_measures, UNITS)
    for measure, values, (low, high) in zip(all_measures, samples.T, intervals, strict=True):
        spread = np.std(values)
        assert (low, high) == pytest.approx(tuple(np.percentile(values, (2.5, 97.5))), abs=0.5 * spread), measure.name
        assert low < compute_value(measure, UNITS) < high


def test_interval_of_a_mean_leaves_out_resamples_without_queries():
    measure = mean_measure("a", "r1", np.array([1.0, 0.0]), np.array([0, 1]), 30)
    assert compute_intervals([measure], 30) == [(0.0, 100.0)]


def test_a_mean_over_subsets_of_too_few_images_has_no_interval():
    parts = [mean_measure(str(k), "r1", np.ones(1), np.array([k]), 12) for k in range(12)]
    (entry,) = make_entries([combine_measures("mean", "r1", parts, 1 / 12)], 12)
    assert (entry["value"], entry["low"], entry["high"]) == (pytest.approx(100.0), None, None)
    assert format_measure(entry) == "100.0"


def test_undefined_measures_are_refused_by_name():
    empty = mean_measure("subset", "accuracy", np.zeros(0), np.zeros(0, int), 4)
    constant = {"scores": np.ones(4), "ratings": np.arange(4.0)[:, None], "unit": np.arange(4), "factor": 100.0}
    for measure in (empty, Measure("all", "tau_c", "tau_c", constant, 4)):
        with pytest.raises(DataError, match=rf"{measure.name}: .* undefined"):
            compute_value(measure, 4)
