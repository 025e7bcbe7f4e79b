"""Ranks and best results, counted tile by tile, against sorting all scores."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_features import length_mask, random_features
from reference_ranking import count_in_tiles, galleries, rank_in_tiles
from systems import make_matcher

from mefn_jax import metrics
from mefn_jax.errors import DataError, TrainingError
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.scoring import ranking
from mefn_jax.scoring.ranking import rank
from mefn_jax.scoring.tiles import TiledScores, compile_tile_scorer

N, M, D = 4, 7, 6


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rank_refuses_score_that_is_not_finite(value):
    scores = np.eye(3, dtype=np.float32)
    scores[1, 2] = value
    with pytest.raises(TrainingError, match="image 1 and caption 2"):
        count_in_tiles(scores, np.arange(3, dtype=np.int32), 2, 2)


@settings(deadline=None, max_examples=150)
@given(galleries(), st.integers(1, 4), st.integers(1, 9), st.integers(1, 12))
def test_rank_top_k_equals_sorted_scores(gallery, tile_images, tile_captions, k):
    scores, image_index = gallery
    result = rank_in_tiles(scores, image_index, tile_images, tile_captions, top_k=k)
    relevant = image_index[None] == np.arange(len(scores))[:, None]
    i2t, t2i = metrics.best_ranks(*result.counts[1], image_index)
    for best, table, relevant_to, ranks in (
        (result.top_captions, scores, relevant, i2t),
        (result.top_images, scores.T, relevant.T, t2i),
    ):
        for query, row in enumerate(table):
            # A tie counts against the model; otherwise the earlier comes first.
            expected = sorted(range(len(row)), key=lambda j, q=query, r=row, t=relevant_to: (-r[j], t[q, j], j))[:k]
            assert best.positions[query].tolist() == expected
            np.testing.assert_array_equal(best.scores[query], row[expected])
            assert relevant_to[query, expected].any() == (ranks[query] <= k)


def test_rank_refuses_image_without_captions():
    with pytest.raises(DataError, match="image 1 of the gallery has no caption"):
        ranking.rank(lambda rows, columns: np.zeros((3, 2)), np.array([0, 2]))


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 2**31), st.sampled_from([(1, 2), (2,), (3, 1), (6,), (2, 3)]), st.integers(1, 5), st.integers(1, 9)
)
def test_rank_folds_equal_ranks_within_each_fold(seed, folds, tile_images, tile_captions):
    rng = np.random.default_rng(seed)
    image_index = np.repeat(np.arange(6, dtype=np.int32), rng.integers(1, 4, 6))
    scores = rng.integers(0, 4, (6, len(image_index))).astype(np.float32)
    result = rank_in_tiles(scores, image_index, tile_images, tile_captions, folds=folds)
    for number in folds:
        for first in range(0, 6, 6 // number):
            inside = (image_index >= first) & (image_index < first + 6 // number)
            part = scores[first : first + 6 // number, inside]
            expected = count_in_tiles(part, image_index[inside] - first, 6, 20)
            for a, b in zip(result.counts[number], expected, strict=True):
                np.testing.assert_array_equal(a[inside], b)


def test_rank_saves_all_scores():
    rng = np.random.default_rng(0)
    scores, image_index = rng.random((5, 10), np.float32), np.repeat(np.arange(5, dtype=np.int32), 2)
    keep = np.zeros_like(scores)
    rank_in_tiles(scores, image_index, 2, 3, save_to=keep)
    np.testing.assert_array_equal(keep, scores)


@pytest.mark.parametrize("name", ["mefn", "scan_i2t_lse", "vsepp"])
def test_rank_is_equal_on_any_number_of_devices(name):
    """On 1, 3 and 8 devices, with tiles that do not divide the gallery, and with images whose scores are equal."""
    module = make_matcher(name)
    images, texts = random_features(2, 21, N, D), random_features(4, 40, M, D, length_mask(0, 40, M))
    images = jax.tree.map(lambda x: np.concatenate([x, x[:3]]), images)
    image_index = np.arange(40) % 24
    params = module.init(jax.random.key(0), images, texts)

    tile, results = functools.partial(module.apply, method="score_tile"), []
    for devices in (1, 3, 8):
        mesh = make_mesh(devices=jax.devices()[:devices])
        program = compile_tile_scorer(tile, module.uses_pooled_products, mesh, 0.005)  # two or three images a tile
        results.append(rank(TiledScores(functools.partial(program, params), images, texts, mesh), image_index, top_k=5))
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, other.counts, results[0].counts)
        np.testing.assert_array_equal(other.top_captions.positions, results[0].top_captions.positions)
        np.testing.assert_array_equal(other.top_images.positions, results[0].top_images.positions)
