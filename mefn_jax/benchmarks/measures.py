"""Measures: numbers of a benchmark, each with what it was computed from, so that it can be computed of any resample.

G units that are resampled (images, with all that belongs to them), R resamples, K parts of a measure.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from mefn_jax.benchmarks.kendall import kendall_tau, sort_judgements
from mefn_jax.errors import DataError
from mefn_jax.evaluation.bootstrap import RESAMPLES, draw_resamples, percentile_bounds

SLOW_RESAMPLES = 1000  # resamples of a statistic that is no mean
RESAMPLES_AT_ONCE = 250


def weighted_ratio(weights: np.ndarray, sums: np.ndarray, counts: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Computes `sum_k factors[k] (sum of sums[:, k]) / (sum of counts[:, k])` with the units weighted by `weights (R,
    G)`, float64 `(R,)`. `sums` and `counts` are `(G, K)`, `factors (K,)`. A part that no unit has is NaN."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((weights @ sums) / (weights @ counts)) @ factors


def weighted_group_mean(weights: np.ndarray, values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Computes the mean over groups of the mean of `values (G,)` in each group, `group (G,)`, float64 `(R,)`. A group
    that a resample lacks is left out of its mean."""
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=group[order][0] - 1))
    weights = weights[:, order]
    sums, counts = (np.add.reduceat(x, starts, axis=1) for x in (weights * values[order], weights))  # (R, groups)
    return np.sum(sums / np.maximum(counts, 1), 1) / np.sum(counts > 0, 1)


def weighted_tau(weights: np.ndarray, scores, ratings, unit, factor, variant: str) -> np.ndarray:
    """Computes `factor` times Kendall's tau of pairs with `scores (P,)`, `ratings (P, J)` and a `unit (P,)` each,
    float64 `(R,)` (see `kendall_tau`)."""
    return float(factor) * kendall_tau(sort_judgements(scores, ratings), weights[:, unit], variant)


def weighted_tau_b(weights: np.ndarray, **arrays) -> np.ndarray:
    """Computes tau-b (see `weighted_tau`)."""
    return weighted_tau(weights, **arrays, variant="tau_b")


def weighted_tau_c(weights: np.ndarray, **arrays) -> np.ndarray:
    """Computes tau-c (see `weighted_tau`)."""
    return weighted_tau(weights, **arrays, variant="tau_c")


class Statistic(NamedTuple):
    """A statistic of weighted units: `compute(weights, **arrays)`, float64 `(R,)`, the names of its arrays, and how
    many resamples its interval is computed from."""

    compute: Callable
    arrays: tuple[str, ...]
    resamples: int = RESAMPLES


STATISTICS = {
    "ratio": Statistic(weighted_ratio, ("sums", "counts", "factors")),
    "group_mean": Statistic(weighted_group_mean, ("values", "group"), SLOW_RESAMPLES),
    "tau_b": Statistic(weighted_tau_b, ("scores", "ratings", "unit", "factor"), SLOW_RESAMPLES),
    "tau_c": Statistic(weighted_tau_c, ("scores", "ratings", "unit", "factor"), SLOW_RESAMPLES),
}


@dataclasses.dataclass(frozen=True)
class Measure:
    """One number of a benchmark: the cell of a table.

    Attributes:
        row, column: where it stands in the table of the benchmark, such as "swap_obj" and "accuracy".
        statistic: a name of STATISTICS.
        arrays: what the statistic is computed from, by unit.
        queries: how many queries, cases or judgements it is of.
        chance: what it is for scores that say nothing; None if that is not known.
    """

    row: str
    column: str
    statistic: str
    arrays: Mapping[str, np.ndarray]
    queries: int
    chance: float | None = None

    @property
    def name(self) -> str:
        """Returns its name in files, `row.column`."""
        return f"{self.row}.{self.column}"

    def compute(self, weights: np.ndarray) -> np.ndarray:
        """Computes the measure with the units weighted by `weights (R, G)`, float64 `(R,)`."""
        return STATISTICS[self.statistic].compute(weights, **self.arrays)


def mean_measure(
    row: str, column: str, values: np.ndarray, unit: np.ndarray, units: int, chance: float | None = None
) -> Measure:
    """Returns the measure that is the mean, in percent, of `values (Q,)` of queries with a `unit (Q,)` each."""
    sums, counts = (np.bincount(unit, weights=x, minlength=units)[:, None] for x in (values, np.ones(len(unit))))
    return Measure(
        row, column, "ratio", {"sums": sums, "counts": counts, "factors": np.array([100.0])}, len(values), chance
    )


def combine_measures(
    row: str, column: str, parts: list[Measure], factor: float, chance: float | None = None, queries: int | None = None
) -> Measure:
    """Returns `factor` times the sum of measures whose statistic is the ratio: their mean, or the sum of recalls.

    `queries`: how many it is of; by default as many as all parts together.
    """
    arrays = {key: np.concatenate([p.arrays[key] for p in parts], 1) for key in ("sums", "counts")}
    arrays["factors"] = factor * np.concatenate([p.arrays["factors"] for p in parts])
    queries = sum(p.queries for p in parts) if queries is None else queries
    return Measure(row, column, "ratio", arrays, queries, chance)


def compute_value(measure: Measure, units: int) -> float:
    """Returns the measure of all units. Raises DataError, naming it, where it is undefined: tau if all scores, or all
    ratings, are equal; a mean of nothing."""
    value = float(measure.compute(np.ones((1, units)))[0])
    if not np.isfinite(value):
        raise DataError(
            f"{measure.name}: {measure.statistic} of {measure.queries} queries is undefined: there are none, or all "
            "scores or all ratings are equal"
        )
    return value


def compute_intervals(measures: list[Measure], units: int, seed: int = 0) -> list[tuple[float, float]]:
    """Returns the 95 % interval of each measure, from bootstrap resamples of the units, the same ones for all (see
    `bound_values`)."""
    values, start = [[] for _ in measures], 0
    resamples = max(STATISTICS[measure.statistic].resamples for measure in measures)
    for draws in draw_resamples(units, resamples, seed, RESAMPLES_AT_ONCE):
        for of_measure, measure in zip(values, measures, strict=True):
            if start < STATISTICS[measure.statistic].resamples:
                of_measure.append(measure.compute(draws))
        start += len(draws)
    return [bound_values(np.concatenate(of_measure)) for of_measure in values]


def bound_values(values: np.ndarray) -> tuple[float, float]:
    """Returns the bounds of the 95 % interval of resampled values `(R,)`.

    Resamples of which a measure is undefined, NaN, are left out: a subset of which no image was drawn. Both bounds are
    NaN if these are more than half: then a subset has too few images for an interval.
    """
    finite = values[np.isfinite(values)]
    return tuple(percentile_bounds(finite).tolist()) if 2 * len(finite) > len(values) else (np.nan, np.nan)
