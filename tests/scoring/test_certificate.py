"""First results found by a bound against rankings of all pairs."""

from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_features import random_features
from systems import make_matcher

from configs.default import get_config
from mefn_jax import metrics
from mefn_jax.errors import TrainingError
from mefn_jax.evaluation.evaluator import Evaluator
from mefn_jax.model import build_model
from mefn_jax.retrieval import searcher
from mefn_jax.retrieval.index import Index
from mefn_jax.runtime.sharding import make_mesh
from mefn_jax.scoring import certificate
from mefn_jax.scoring.ranking import rank


def certify(scores, centers, radius, k):
    return certificate.find_first_results(
        lambda rows, columns: centers[rows, columns],
        radius,
        lambda rows, columns: scores[rows, columns],
        *scores.shape,
        k,
    )


def assert_same_first_results(found, whole, caption_image, k):
    """Recall up to k and the first k of every query, ties included."""
    assert max(count.max() for count in found.counts[1]) <= k
    for found_ranks, ranks in zip(
        metrics.best_ranks(*found.counts[1], caption_image),
        metrics.best_ranks(*whole.counts[1], caption_image),
        strict=True,
    ):
        np.testing.assert_array_equal(np.minimum(found_ranks, k + 1), np.minimum(ranks, k + 1))
    for side in ("top_captions", "top_images"):
        for field in ("positions", "relevant"):
            np.testing.assert_array_equal(getattr(getattr(found, side), field), getattr(getattr(whole, side), field))
        np.testing.assert_allclose(getattr(found, side).scores, getattr(whole, side).scores, atol=2e-6)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 4), st.integers(1, 6), st.sampled_from([0.0, 0.1, 0.5])
)
def test_first_results_equal_those_of_all_pairs(seed, images, captions_each, k, radius):
    """Scores lie anywhere within their intervals; many are equal."""
    rng = np.random.default_rng(seed)
    caption_image = rng.permutation(np.repeat(np.arange(images), captions_each))
    shape = images, len(caption_image)
    centers = np.round(rng.normal(size=shape), 1).astype(np.float32)
    scores = centers + radius * rng.choice(np.float32([-1, -0.5, 0, 1]), shape)
    most, block = certificate.MOST, certificate.BLOCK_PAIRS
    try:
        certificate.MOST, certificate.BLOCK_PAIRS = 1.0, 3 * images
        first = certify(scores, centers, radius, k)
    finally:
        certificate.MOST, certificate.BLOCK_PAIRS = most, block
    pairs = first.images * shape[1] + first.captions
    assert len(np.unique(pairs)) == len(pairs) == round(sum(first.shares) * scores.size)
    np.testing.assert_array_equal(first.scores, scores[first.images, first.captions])
    whole = rank(lambda rows, columns: scores[rows, columns], caption_image, top_k=k)
    assert_same_first_results(certificate.rank_first_results(first, caption_image), whole, caption_image, k)


def test_find_first_results_gives_up_above_half_of_the_pairs():
    rng = np.random.default_rng(0)
    centers = rng.uniform(-1, 1, (20, 40)).astype(np.float32)
    assert certify(centers, centers, 2.0, 10) is None
    first = certify(centers, centers, 0.0, 2)
    assert 2 / 20 <= first.shares[0] < 0.12
    assert 0 < first.shares[1] <= 2 / 40 + 0.01


def test_scores_that_are_not_finite_are_an_error():
    centers = np.zeros((3, 4), np.float32)
    broken = centers.copy()
    broken[1, 2] = np.nan
    with pytest.raises(TrainingError, match="image 1 and caption 2 is nan"):
        certify(centers, broken, 0.1, 2)


def make_evaluator(devices, width, **options):
    config = get_config("model=mate,smoke")
    config.matcher.update(layers=1, mlp_width=12, **options)
    model, mesh = build_model(config, 100), make_mesh(devices=jax.devices()[:devices])
    examples = [random_features(seed, 2, 1, width) for seed in (0, 1)]
    params = {"matcher": model.matcher.init(jax.random.key(0), *examples)["params"]}
    if model.hubness:
        params["hubness"] = model.hubness.init(jax.random.key(1), *(x.pooled for x in examples))["params"]
    return Evaluator(model, None, config, mesh), params


def related_features(images, captions_each, width, noise, seed=0):
    """Images and captions whose pooled embeddings are alike if they belong together."""
    rng = np.random.default_rng(seed)
    images_ = random_features(rng, images, 1, width)
    texts = random_features(rng, images * captions_each, 2, width)
    caption_image = np.repeat(np.arange(images), captions_each)
    pooled = images_.pooled[caption_image] + noise * texts.pooled
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    return images_, texts.replace(pooled=pooled), caption_image


@pytest.mark.parametrize(("devices", "hub_vectors"), [(1, 0), (8, 4)])
def test_evaluator_certifies_the_first_ten_with_hub_offsets(devices, hub_vectors):
    evaluator, params = make_evaluator(devices, 24, hub_vectors=hub_vectors)
    *features, caption_image = related_features(50, 3, 24, 0.6)
    whole = rank(evaluator.scores(params, *features), caption_image, top_k=10)
    scores = np.asarray(evaluator.model.score(params, *features))
    offsets = evaluator.hub_offsets(params, *features)
    assert (np.ptp(offsets[0]) > 0) == (hub_vectors > 0)
    tile = evaluator.scores(params, *features)(slice(3, 40), slice(5, 150))
    np.testing.assert_allclose(tile, (scores - offsets[0][:, None] - offsets[1])[3:40, 5:150], atol=2e-6)
    found, shares = evaluator.rank_first(params, *features, caption_image, 10)
    assert_same_first_results(found, whole, caption_image, 10)
    assert 0 < sum(shares) < 0.5
    own = ~np.isnan(found.positive_scores)
    np.testing.assert_allclose(found.positive_scores[own], whole.positive_scores[own], atol=2e-6)


@pytest.mark.parametrize("weight", [2.0, -2.0])
def test_certified_search_finds_the_best_images_with_hub_offsets(weight, monkeypatch):
    """Offsets of either sign, larger than the bound: one that is left out, or has another sign, ends a search early."""
    evaluator, params = make_evaluator(1, 24, hub_vectors=4)
    params["hubness"]["weight"] = np.float32(weight)
    images, texts, _ = related_features(150, 1, 24, 0.6)
    texts = jax.tree.map(lambda x: x[:12], texts)
    offsets = evaluator.hub_offsets(params, images, texts)
    assert max(np.abs(offsets[1])) > 0.2
    scores = np.asarray(evaluator.model.score(params, images, texts)) - offsets[0][:, None] - offsets[1]
    names, vectors = [str(k) for k in range(150)], evaluator.image_vectors(params, images)
    opened = Index(Path(), names, np.ones(150, bool), vectors, images.pooled, images.fragments, images.mask)
    monkeypatch.setattr(searcher, "FIRST_CANDIDATES", 3)
    found = searcher.Searcher(evaluator, params, opened).search(texts, 3)
    for result, of_text in zip(found, scores.T, strict=True):
        np.testing.assert_allclose(result.scores, np.sort(of_text)[::-1][:3], atol=1e-5)
        np.testing.assert_allclose(of_text[result.positions], result.scores, atol=1e-5)
    assert min(result.num_scored for result in found) < 75  # so that some searches end by the bound


def test_evaluator_ranks_the_first_ten_of_1000_images_and_5000_captions():
    evaluator, params = make_evaluator(1, 16)
    *features, caption_image = related_features(1000, 5, 16, 0.6)
    found, shares = evaluator.rank_first(params, *features, caption_image, 10)
    whole = rank(evaluator.scores(params, *features), caption_image, top_k=10)
    assert_same_first_results(found, whole, caption_image, 10)
    print(f"shares of the pairs scored: {shares}")
    assert sum(shares) < 0.5
    assert found.seconds > 0
    assert make_matcher("mate").share == 0.1  # the share that the radius follows from
