"""Kendall's tau against SciPy's, on random and on tied scores, and with pairs that are drawn several times."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from mefn_jax.benchmarks import kendall
from mefn_jax.benchmarks.kendall import kendall_tau, sort_judgements


def scipy_tau(scores, ratings, variant):
    """SciPy's tau of single judgements: a pair's score is repeated for each of its judgements."""
    single = ratings.reshape(-1)
    known = ~np.isnan(single)
    if known.sum() < 2:
        return np.nan
    return kendalltau(np.repeat(scores, ratings.shape[1])[known], single[known], variant=variant[-1]).statistic


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(1, 3), st.booleans(), st.sampled_from(("tau_b", "tau_c")))
def test_kendall_tau_equals_scipy(seed, pairs, judgements, tied, variant):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, pairs).astype(float) if tied else rng.normal(size=pairs)
    ratings = rng.integers(1, 5, (pairs, judgements)).astype(float)
    ratings[rng.random(ratings.shape) < 0.1] = np.nan
    ratings[0, 0] = 1.0
    own = kendall_tau(sort_judgements(scores, ratings), np.ones((1, pairs)), variant)[0]
    assert own == pytest.approx(scipy_tau(scores, ratings, variant), abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("variant", ["tau_b", "tau_c"])
def test_kendall_tau_of_weights_equals_scipy_on_repeated_pairs(variant, monkeypatch):
    monkeypatch.setattr(kendall, "PAIRS_AT_ONCE", 300)  # several blocks
    rng = np.random.default_rng(1)
    scores, ratings = rng.integers(0, 9, 30).astype(float), rng.integers(1, 5, (30, 3)).astype(float)
    weights = rng.multinomial(30, np.full(30, 1 / 30), 8)
    own = kendall_tau(sort_judgements(scores, ratings), weights.astype(float), variant)
    expected = [scipy_tau(np.repeat(scores, w), np.repeat(ratings, w, 0), variant) for w in weights]
    np.testing.assert_allclose(own, expected, atol=1e-12)


def test_kendall_tau_of_equal_scores_or_ratings_is_undefined():
    ratings = np.array([[1.0, 2.0], [3.0, 4.0]])
    for scores, of_pairs in ((np.ones(2), ratings), (np.arange(2.0), np.ones((2, 2)))):
        for variant in ("tau_b", "tau_c"):
            assert np.isnan(kendall_tau(sort_judgements(scores, of_pairs), np.ones((1, 2)), variant)).all()
