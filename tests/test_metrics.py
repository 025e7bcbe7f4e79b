"""Metrics against an independent naive implementation, written from the definition in DESIGN.md 8."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mefn_jax import metrics
from mefn_jax.errors import DataError, TrainingError
from mefn_jax.scoring import ranking


def naive(scores, owner):
    """Ranks and average precisions one query at a time, straight from the definition."""
    images, captions = scores.shape
    i2t, ap_i2t, t2i, ap_t2i = [], [], [], []
    for i in range(images):
        relevant = [c for c in range(captions) if owner[c] == i]
        n = {g: sum(scores[i, c] >= scores[i, g] for c in range(captions) if owner[c] != i) for g in relevant}
        i2t.append(1 + min(n.values()))
        by_score = sorted(relevant, key=lambda g: -scores[i, g])
        ap_i2t.append(sum(k / (k + n[g]) for k, g in enumerate(by_score, 1)) / len(relevant))
    for c in range(captions):
        n = sum(scores[i, c] >= scores[owner[c], c] for i in range(images) if i != owner[c])
        t2i.append(1 + n)
        ap_t2i.append(1 / (1 + n))
    return i2t, t2i, 100 * np.mean(ap_i2t), 100 * np.mean(ap_t2i)


def ranked(scores, owner, tile_images, tile_captions, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "TILE_IMAGES", tile_images)
        patch.setattr(ranking, "TILE_CAPTIONS", tile_captions)
        return ranking.rank(lambda r, c: scores[r, c], owner, **options)


def counts(scores, owner, tile_images, tile_captions):
    return ranked(scores, owner, tile_images, tile_captions).counts[1]


@st.composite
def galleries(draw):
    """Scores with many ties, 1 to 4 captions an image, sometimes in shuffled order."""
    number = draw(st.lists(st.integers(1, 4), min_size=1, max_size=7))
    owner = np.repeat(np.arange(len(number), dtype=np.int32), number)
    if draw(st.booleans()):
        owner = owner[draw(st.permutations(range(len(owner))))]
    levels = draw(st.sampled_from([2, 4, 1000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng.integers(0, levels, (len(number), len(owner))).astype(np.float32) / levels, owner


@settings(deadline=None, max_examples=200)
@given(galleries(), st.integers(1, 4), st.integers(1, 9))
def test_equals_the_naive_definition(gallery, tile_images, tile_captions):
    scores, owner = gallery
    n_i2t, n_t2i = counts(scores, owner, tile_images, tile_captions)
    i2t, t2i, map_i2t, map_t2i = naive(scores, owner)
    ranks = metrics.best_ranks(n_i2t, n_t2i, owner)
    np.testing.assert_array_equal(ranks[0], i2t)
    np.testing.assert_array_equal(ranks[1], t2i)
    result = metrics.retrieval_metrics(n_i2t, n_t2i, owner)
    assert result["i2t"]["map"] == pytest.approx(map_i2t)
    assert result["t2i"]["map"] == pytest.approx(map_t2i)
    for side, expected in (("i2t", i2t), ("t2i", t2i)):
        for k in (1, 5, 10):
            assert result[side][f"r{k}"] == pytest.approx(100 * np.mean(np.array(expected) <= k))
        assert result[side]["medr"] == np.median(expected)
        assert result[side]["meanr"] == pytest.approx(np.mean(expected))
    # The bounds of PEERS.md 2.
    assert result["t2i"]["r1"] <= result["t2i"]["map"] + 1e-9
    most = np.bincount(owner).max()
    assert result["i2t"]["r1"] / most <= result["i2t"]["map"] + 1e-9
    assert result["rsum"] == pytest.approx(sum(result[s][f"r{k}"] for s in ("i2t", "t2i") for k in (1, 5, 10)))


def test_ties_count_against_the_model_but_not_among_the_relevant():
    owner = np.repeat(np.arange(3, dtype=np.int32), 2)
    n_i2t, n_t2i = counts(np.zeros((3, 6), np.float32), owner, 2, 4)
    i2t, t2i = metrics.best_ranks(n_i2t, n_t2i, owner)
    assert i2t.tolist() == [5, 5, 5]  # all four captions of other images stand before
    assert t2i.tolist() == [3] * 6
    perfect = (np.arange(3)[:, None] == owner[None]).astype(np.float32)
    assert metrics.retrieval_metrics(*counts(perfect, owner, 2, 4), owner)["rsum"] == 600


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_an_error(value):
    scores = np.eye(3, dtype=np.float32)
    scores[1, 2] = value
    with pytest.raises(TrainingError, match="image 1 and caption 2"):
        counts(scores, np.arange(3, dtype=np.int32), 2, 2)


def test_chance_is_what_random_scores_give():
    owner = np.repeat(np.arange(12, dtype=np.int32), [1, 2, 3] * 4)
    rng = np.random.default_rng(0)
    draws = [
        metrics.retrieval_metrics(*counts(rng.random((12, 24), np.float32), owner, 12, 24), owner) for _ in range(600)
    ]
    mean, expected = metrics.average_metrics(draws), metrics.chance_recalls(12, owner)
    for side in ("i2t", "t2i"):
        for k in ("r1", "r5", "r10"):
            assert mean[side][k] == pytest.approx(expected[side][k], abs=2)


@settings(deadline=None, max_examples=150)
@given(galleries(), st.integers(1, 4), st.integers(1, 9), st.integers(1, 12))
def test_the_best_of_every_query_are_numpys_and_agree_with_the_ranks(gallery, tile_images, tile_captions, k):
    scores, owner = gallery
    found = ranked(scores, owner, tile_images, tile_captions, best=k)
    relevant = owner[None] == np.arange(len(scores))[:, None]
    ranks = metrics.best_ranks(*found.counts[1], owner)
    for best, table, true, rank in (
        (found.top_captions, scores, relevant, ranks[0]),
        (found.top_images, scores.T, relevant.T, ranks[1]),
    ):
        for query, row in enumerate(table):
            # A tie counts against the model; else the earlier comes first.
            expected = sorted(range(len(row)), key=lambda j, q=query, r=row, t=true: (-r[j], t[q, j], j))[:k]
            assert best.positions[query].tolist() == expected
            np.testing.assert_array_equal(best.scores[query], row[expected])
            assert true[query, expected].any() == (rank[query] <= k)


def test_an_image_without_captions_has_no_rank():
    with pytest.raises(DataError, match="image 1 of the gallery has no caption"):
        ranking.rank(lambda rows, columns: np.zeros((3, 2)), np.array([0, 2]))


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 2**31), st.sampled_from([(1, 2), (2,), (3, 1), (6,), (2, 3)]), st.integers(1, 5), st.integers(1, 9)
)
def test_folds_are_counted_from_the_same_scores(seed, folds, tile_images, tile_captions):
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(6, dtype=np.int32), rng.integers(1, 4, 6))
    scores = rng.integers(0, 4, (6, len(owner))).astype(np.float32)
    found = ranked(scores, owner, tile_images, tile_captions, folds=folds)
    for number in folds:
        for first in range(0, 6, 6 // number):
            inside = (owner >= first) & (owner < first + 6 // number)
            part = scores[first : first + 6 // number, inside]
            expected = counts(part, owner[inside] - first, 6, 20)
            for a, b in zip(found.counts[number], expected, strict=True):
                np.testing.assert_array_equal(a[inside], b)


def test_all_scores_are_kept_if_asked_for():
    rng = np.random.default_rng(0)
    scores, owner = rng.random((5, 10), np.float32), np.repeat(np.arange(5, dtype=np.int32), 2)
    keep = np.zeros_like(scores)
    ranked(scores, owner, 2, 3, save_to=keep)
    np.testing.assert_array_equal(keep, scores)
