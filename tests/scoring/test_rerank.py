"""Two-stage retrieval: the lists are NumPy's, their scores those of all pairs, their ranks a naive loop's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.default import get_config
from mefn_jax import metrics
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.features import make_features
from mefn_jax.model import MODELS, build_model
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.scoring import packing, rerank

IMAGES, CAPTIONS, N, M, D = 9, 23, 4, 6, 8


def features(seed, mask):
    rng = np.random.default_rng(seed)
    raw, pooled = rng.normal(size=(*mask.shape, D)), rng.normal(size=(len(mask), D))
    found = make_features(jnp.asarray(raw, jnp.float32), jnp.asarray(mask), jnp.asarray(pooled, jnp.float32))
    return jax.tree.map(np.asarray, found)


def some_of_each():
    rng = np.random.default_rng(0)
    return features(0, np.ones((IMAGES, N), bool)), features(1, np.arange(M) < rng.integers(1, M + 1, (CAPTIONS, 1)))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", ["mefn", "scan_t2i_lse"])
def test_what_is_shortlisted_is_scored_as_all_pairs_are(name, devices, monkeypatch):
    monkeypatch.setattr(rerank, "TILES_PER_CALL", 2)
    monkeypatch.setattr(packing, "GROUP_TEXTS", 4)
    images, texts = some_of_each()
    module, mesh = MODELS[name][0](**MODELS[name][1]), make_mesh(devices=jax.devices()[:devices])
    params = module.init(jax.random.key(0), images, texts)
    coarse = [np.asarray(module.apply(params, x, method="embed")) for x in (images, texts)]
    programs = rerank.compile_reranker(functools.partial(module.apply, method="score_tile"), mesh)
    two_images = 4 * 2 * N * packing.GROUP_WORDS / 2**20
    found = rerank.score_candidates(programs, params, images, texts, *coarse, 3, mesh, two_images)
    scores = np.asarray(jax.jit(module.apply)(params, images, texts))
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores.T, found.images, 1), atol=1e-5)
    _, captions, _ = packing.plan_groups(texts.mask, rerank.similarity_order(coarse[1]))
    products = coarse[1] @ coarse[0].T
    for group in captions:
        group = group[group >= 0]
        near = np.max([(p - p.mean()) / (p.max() - p.mean()) for p in products[group]], 0)
        for caption in group:
            np.testing.assert_allclose(near[found.images[caption]], -np.sort(-near)[:3], atol=1e-5)
            assert len(set(found.images[caption])) == 3


def test_levels_are_taken_from_the_scores_of_both_stages():
    """A background, whose levels are no part of a tile."""
    config = get_config("model=mefn,smoke")
    config.matcher.hub_vectors = 4
    model, (images, texts) = build_model(config, 100), some_of_each()
    params = {"matcher": model.matcher.init(jax.random.key(0), images, texts)["params"]}
    evaluator = Evaluator(model, None, config, make_mesh(devices=jax.devices()[:2]))
    expected = np.asarray(jax.jit(model.score)(params, images, texts))
    levels = evaluator.hub_offsets(params, images, texts)
    assert min(np.ptp(x) for x in levels) > 1e-3
    scores = evaluator.scores(params, images, texts)(slice(2, 7), slice(3, CAPTIONS))
    np.testing.assert_allclose(scores, expected[2:7, 3:], atol=1e-5)
    found = evaluator.rerank(params, images, texts, 4)
    np.testing.assert_allclose(found.scores, np.take_along_axis(expected.T, found.images, 1), atol=1e-5)


def test_the_order_is_one_in_which_neighbours_are_near():
    vectors = np.random.default_rng(0).normal(size=(500, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    order = rerank.similarity_order(vectors)
    np.testing.assert_array_equal(np.sort(order), np.arange(500))
    assert np.mean(np.sum(vectors[order[1:]] * vectors[order[:-1]], 1)) > 0.9  # at random 0
    np.testing.assert_array_equal(np.sort(rerank.similarity_order(np.ones((20, 3)))), np.arange(20))


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_ranks_within_shortlists_are_those_of_a_loop(seed, k):
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.repeat(np.arange(6), 2))
    scores, coarse = rng.integers(-2, 2, (2, 6, 12)).astype(np.float32)  # with ties
    scores = np.where((scores == 0) & (rng.random(scores.shape) < 0.5), np.float32(-0.0), 0.1 * scores)
    lists = np.argsort(-coarse.T, 1)[:, :k]
    found = rerank.Candidates(lists, np.take_along_axis(scores.T, lists, 1))
    i2t, t2i = metrics.best_ranks(*rerank.rank_counts(found, owner), owner)
    for c in range(12):
        listed = list(lists[c])
        better = sum(scores[i, c] >= scores[owner[c], c] for i in listed if i != owner[c])
        assert t2i[c] == (1 + better if owner[c] in listed else 6)
    for i in range(6):
        listed = [c for c in range(12) if i in lists[c]]
        n = [sum(scores[i, c] >= scores[i, g] for c in listed if owner[c] != i) for g in listed if owner[g] == i]
        assert i2t[i] == (1 + min(n) if n else 11)
