"""Reranking: the candidates against NumPy, their scores against all pairs, their ranks against a naive loop."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_features import length_mask, random_features
from systems import make_matcher, projections_of

from mefn_jax import metrics
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.scoring import packing, rerank

IMAGES, CAPTIONS, N, M, D = 9, 23, 4, 6, 8


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", ["mefn", "scan_t2i_lse", "visita"])
def test_score_candidates_equals_scores_of_all_pairs(name, devices, monkeypatch):
    monkeypatch.setattr(rerank, "TILES_PER_CALL", 2)
    monkeypatch.setattr(packing, "GROUP_TEXTS", 4)
    images = random_features(0, IMAGES, N, D)
    texts = random_features(1, CAPTIONS, M, D, length_mask(0, CAPTIONS, M))
    module, mesh = make_matcher(name), make_mesh(devices=jax.devices()[:devices])
    params = module.init(jax.random.key(0), images, texts)
    embeddings = [np.asarray(module.apply(params, x, method="embed")) for x in (images, texts)]
    score_tile = functools.partial(module.apply, method="score_tile")
    programs = rerank.compile_reranker(score_tile, module.uses_pooled_products, mesh, projections_of(module))
    two_images = 4 * 2 * N * packing.GROUP_WORDS / 2**20
    candidates = rerank.score_candidates(programs, params, images, texts, *embeddings, 3, mesh, two_images)
    scores = np.asarray(jax.jit(module.apply)(params, images, texts))
    np.testing.assert_allclose(candidates.scores, np.take_along_axis(scores.T, candidates.images, 1), atol=1e-5)
    _, captions, _ = packing.plan_groups(texts.mask, rerank.similarity_order(embeddings[1]))
    products = embeddings[1] @ embeddings[0].T
    for group in captions:
        group = group[group >= 0]
        relevance = np.max([(p - p.mean()) / (p.max() - p.mean()) for p in products[group]], 0)
        for caption in group:
            np.testing.assert_allclose(relevance[candidates.images[caption]], -np.sort(-relevance)[:3], atol=1e-5)
            assert len(set(candidates.images[caption])) == 3


def test_similarity_order_keeps_neighbors_similar():
    vectors = np.random.default_rng(0).normal(size=(500, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    order = rerank.similarity_order(vectors)
    np.testing.assert_array_equal(np.sort(order), np.arange(500))
    assert np.mean(np.sum(vectors[order[1:]] * vectors[order[:-1]], 1)) > 0.9  # in random order it would be about 0
    np.testing.assert_array_equal(np.sort(rerank.similarity_order(np.ones((20, 3)))), np.arange(20))


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_rank_counts_of_candidates_equal_naive_loop(seed, k):
    rng = np.random.default_rng(seed)
    image_index = rng.permutation(np.repeat(np.arange(6), 2))
    scores, products = rng.integers(-2, 2, (2, 6, 12)).astype(np.float32)  # with ties
    scores = np.where((scores == 0) & (rng.random(scores.shape) < 0.5), np.float32(-0.0), 0.1 * scores)
    image_lists = np.argsort(-products.T, 1)[:, :k]
    candidates = rerank.Candidates(image_lists, np.take_along_axis(scores.T, image_lists, 1))
    i2t, t2i = metrics.best_ranks(*rerank.rank_counts(candidates, image_index), image_index)
    for c in range(12):
        listed = list(image_lists[c])
        better = sum(scores[i, c] >= scores[image_index[c], c] for i in listed if i != image_index[c])
        assert t2i[c] == (1 + better if image_index[c] in listed else 6)
    for i in range(6):
        listed = [c for c in range(12) if i in image_lists[c]]
        n = [
            sum(scores[i, c] >= scores[i, g] for c in listed if image_index[c] != i)
            for g in listed
            if image_index[g] == i
        ]
        assert i2t[i] == (1 + min(n) if n else 11)
