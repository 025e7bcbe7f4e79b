"""Retrieval metrics against a naive implementation, one query at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_ranking import count_in_tiles, galleries

from mefn_jax import metrics


def naive_metrics(scores, image_index):
    """Ranks and average precisions by their definition, one query at a time."""
    images, captions = scores.shape
    i2t, ap_i2t, t2i, ap_t2i = [], [], [], []
    for i in range(images):
        relevant = [c for c in range(captions) if image_index[c] == i]
        n = {g: sum(scores[i, c] >= scores[i, g] for c in range(captions) if image_index[c] != i) for g in relevant}
        i2t.append(1 + min(n.values()))
        by_score = sorted(relevant, key=lambda g: -scores[i, g])
        ap_i2t.append(sum(k / (k + n[g]) for k, g in enumerate(by_score, 1)) / len(relevant))
    for c in range(captions):
        n = sum(scores[i, c] >= scores[image_index[c], c] for i in range(images) if i != image_index[c])
        t2i.append(1 + n)
        ap_t2i.append(1 / (1 + n))
    return i2t, t2i, 100 * np.mean(ap_i2t), 100 * np.mean(ap_t2i)


@settings(deadline=None, max_examples=200)
@given(galleries(), st.integers(1, 4), st.integers(1, 9))
def test_retrieval_metrics_equal_naive_definition(gallery, tile_images, tile_captions):
    scores, image_index = gallery
    n_i2t, n_t2i = count_in_tiles(scores, image_index, tile_images, tile_captions)
    i2t, t2i, map_i2t, map_t2i = naive_metrics(scores, image_index)
    ranks = metrics.best_ranks(n_i2t, n_t2i, image_index)
    np.testing.assert_array_equal(ranks[0], i2t)
    np.testing.assert_array_equal(ranks[1], t2i)
    result = metrics.retrieval_metrics(n_i2t, n_t2i, image_index)
    assert result["i2t"]["map"] == pytest.approx(map_i2t)
    assert result["t2i"]["map"] == pytest.approx(map_t2i)
    for side, expected in (("i2t", i2t), ("t2i", t2i)):
        for k in (1, 5, 10):
            assert result[side][f"r{k}"] == pytest.approx(100 * np.mean(np.array(expected) <= k))
        assert result[side]["medr"] == np.median(expected)
        assert result[side]["meanr"] == pytest.approx(np.mean(expected))
    # Recall at 1 bounds the mean average precision from below, with one relevant result and with several.
    assert result["t2i"]["r1"] <= result["t2i"]["map"] + 1e-9
    most_captions = np.bincount(image_index).max()
    assert result["i2t"]["r1"] / most_captions <= result["i2t"]["map"] + 1e-9
    assert result["rsum"] == pytest.approx(sum(result[s][f"r{k}"] for s in ("i2t", "t2i") for k in (1, 5, 10)))


def test_best_ranks_count_ties_against_model():
    image_index = np.repeat(np.arange(3, dtype=np.int32), 2)
    n_i2t, n_t2i = count_in_tiles(np.zeros((3, 6), np.float32), image_index, 2, 4)
    i2t, t2i = metrics.best_ranks(n_i2t, n_t2i, image_index)
    assert i2t.tolist() == [5, 5, 5]  # all four captions of the other images rank before
    assert t2i.tolist() == [3] * 6
    perfect = (np.arange(3)[:, None] == image_index[None]).astype(np.float32)
    assert metrics.retrieval_metrics(*count_in_tiles(perfect, image_index, 2, 4), image_index)["rsum"] == 600


def test_chance_recalls_equal_mean_over_random_scores():
    image_index = np.repeat(np.arange(12, dtype=np.int32), [1, 2, 3] * 4)
    rng = np.random.default_rng(0)
    draws = [
        metrics.retrieval_metrics(*count_in_tiles(rng.random((12, 24), np.float32), image_index, 12, 24), image_index)
        for _ in range(600)
    ]
    mean, expected = metrics.average_metrics(draws), metrics.chance_recalls(12, image_index)
    for side in ("i2t", "t2i"):
        for k in ("r1", "r5", "r10"):
            assert mean[side][k] == pytest.approx(expected[side][k], abs=2)
