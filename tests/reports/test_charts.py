"""Charts of very little data."""

import numpy as np

from mefn_jax.reports import charts


def test_charts_draw_minimal_data():
    """One line of a log, a comparison of two rows, and scores without negatives."""
    charts.training_curves([{"step": 1, "loss": 1.0}]).draw_without_rendering()
    row = {"name": "x" * 100, "means": {"i2t.r1": 1.0, "t2i.r1": 2.0, "rsum": 9.0}, "interval": None}
    row["spreads"] = dict.fromkeys(row["means"], float("nan"))
    charts.comparison_chart([row, row | {"interval": (-3.0, 2.0)}]).draw_without_rendering()
    charts.score_histograms(np.array([0.5, 0.5]), np.array([np.nan]), np.array([0.1, np.nan])).draw_without_rendering()
